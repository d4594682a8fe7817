"""Gradient Rectified Unlearning: objectives, rules, the step, checkpoints, metrics, the frontier.

Needs torch, transformers, numpy and safetensors; never Ray or MLflow, which live in ``pipelines``.
"""
