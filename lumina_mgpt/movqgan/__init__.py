"""The image tokenizer MoVQGAN: converts images to grids of codes and back."""
