"""What is trained: pure PyTorch, without files, processes or clocks."""
