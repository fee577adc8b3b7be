"""Distillation: losses, methods and the one training loop they share."""
