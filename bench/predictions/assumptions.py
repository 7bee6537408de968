"""What the predictions assume beside the published rates of bench/chips.py. None of it was measured."""

LIBRARY = 0.7  # of the dense rate, in a library's products of a layer's size
LATENCY = 2.0e-6  # seconds of a launch in a graph, of its first loads, and of what follows the last store, on any chip
DEPENDENT_LOAD = 0.6e-6  # seconds of a load whose address another load gave, or that a loop waits for
REACHED = 0.85  # of the rate of the resource that bounds a compiled kernel
PRODUCTS = 0.5  # of the tensor cores' rate, in the products of csrc/matrix_product.cuh, whose loads are not hidden
TRITON = 0.75  # of the rate of the resource that bounds a kernel of Triton, whose loads the compiler schedules
TRITON_INSTRUCTIONS = 1.3  # instructions of a tile over the CUDA kernel's: 64-bit addresses, masks, conversions of layouts
L2_LOAD = 0.3e-6  # seconds of a load that finds its line in L2, and of the one that gave its address
