"""Diffusion mathematics (noise path, sampler step, rollout, sampling) and the interfaces of
batches, contexts and model parts."""
