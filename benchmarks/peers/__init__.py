"""One MAML meta-step as each library computes it, in processes of their own."""
