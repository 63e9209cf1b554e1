"""C++ headers that kernels share: vectors, element types, and products of tiles and with packed matrices."""
