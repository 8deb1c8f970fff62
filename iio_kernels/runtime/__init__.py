"""What the operations stand on: backends, the build of the compiled kernels, checks of arguments, autograd."""
