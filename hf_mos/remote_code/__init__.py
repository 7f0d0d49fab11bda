"""The code that travels: `save_pretrained` copies these files beside the weights."""
