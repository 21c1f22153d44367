"""What turns a method's losses into weights: adapters, roles, the loop, checkpoints."""
