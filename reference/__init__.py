"""The PyTorch twin of ferret_mlx: reference model, synthetic scenes and the training of ferret-tiny.

Only tests, training and benchmarks import this package; the runtime never does.
"""
