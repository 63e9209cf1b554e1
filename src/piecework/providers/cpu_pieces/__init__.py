"""The C interface by which pieces call C++ of ours (products.h of cpu_common), which is compiled into them."""
