"""What people look at: figures, pages, pictures of the samples used."""
