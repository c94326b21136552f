"""Rollouts, without torch: environments, chat templates, the client of the inference server, waves, advantages."""
