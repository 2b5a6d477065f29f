"""Rollouts from vLLM, in the trainer's process or from a server."""
