"""Reading and checking models in other formats."""
