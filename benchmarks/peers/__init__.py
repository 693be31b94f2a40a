"""fxquant beside the tools that a user would pick instead, on the CPU: kernels, whole models, overhead, plain eager."""
