"""The mathematics and the interfaces: noise path, sampler step, rollout, sampling, batches and
components."""
