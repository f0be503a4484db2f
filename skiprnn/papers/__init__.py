"""A table = rows × seeds → runs → records → statistics → text."""
