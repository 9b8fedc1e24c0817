"""C kernels for what torch does slowly on a CPU, compiled where they run; without a compiler, torch does it."""
