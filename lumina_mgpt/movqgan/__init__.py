"""The image tokenizer MoVQGAN: images to grids of codes and back."""
