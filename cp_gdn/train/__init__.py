"""Training: one run from a TrainConfig (config.py) to plots, metrics and checkpoints (trainer.py).

topology    the (dp, cp) mesh            step, guard   one optimizer step, and what stops it engine
the model under DeepSpeed    checkpoint    whole or absent; resume data        text to packs
callbacks     one concern each: perf, metrics, progress, W&B, plots
"""
