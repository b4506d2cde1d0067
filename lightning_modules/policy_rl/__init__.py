"""Policy RL: one family, six hooks; GRPO is the general method that the others specialise."""
