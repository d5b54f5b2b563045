"""PyTorch nets that neither torchvision nor timm has, with the module names of the code that published them."""
