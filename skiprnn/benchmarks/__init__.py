"""How long engines take: what skiprnn.bench measures."""
