"""The PyTorch twin of ferret_mlx: reference model, synthetic scenes, training of ferret-tiny.

Only tests, training and benchmarks import this package; the runtime never does.
"""
