"""``bench gpu``: what a GPU computes, and how fast, in parts that run in processes of their own."""
