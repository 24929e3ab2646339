"""Training and inference loops. They receive the loader and the networks as arguments."""
