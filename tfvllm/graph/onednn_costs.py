"""From which sizes on oneDNN's kernels pay, each figure with the measurement that found it."""

import tensorflow as tf

LAYER_NORM_ELEMENTS = 1 << 16
"""Elements from which the fused layer norm is faster than public ops.

TensorFlow prepares the kernel and copies γ and β at every call: 130 to 190 µs whatever the size. Nine public ops take
40 to 60 µs for small inputs and draw level at 58,000 elements (width 384) to 65,000 (768), on two AVX-512 cores.
"""

QUANTIZE_ELEMENTS = 1 << 16
"""Elements from which QuantizeV2 is faster than public ops.

oneDNN prepares its kernel at every call: 45 to 64 µs whatever the size. Five other ops take 5 µs for 6,144 elements, 15
for 24,576, 33 for 49,152, 35 for 98,304 and 180 for 196,608, on two AVX-512 cores.
"""

ATTENTION_SCORES = 1 << 13
"""Scores (batch·heads·queries·keys) from which oneDNN's products and softmax are faster than TensorFlow's own.

They are prepared at every call. Two products and a softmax took, in µs, by oneDNN and by the others, on two AVX-512
cores: 169 and 66 for 1,536 scores, 162 and 121 for 6,144, 158 and 145 for 12,288, 211 and 225 for 24,576, 489 and
1,182 for 196,608 (heads of 32 channels). Of that a softmax alone is 40 µs for 1,536.
"""

PACKED_ROWS = (8, 33)
"""Rows, from and up to which a float32 product of a graph as it comes gains by weights that are kept packed.

In that range oneDNN 3 packs them in one layout. Times as fast as packing at every call (`benchmarks/packed.py`, width
768 and 384): 1.6 and 1.4 for 8 rows, 1.3 and 1.2 for 16, 1.1 for 32, 0.9 and 1.0 for 40.
"""

OTHER_ROWS = {tf.bfloat16: (1, 1), tf.float32: (8, 63)}
"""Least and most rows of a generation's step for which the less usual kernel of a type is the faster one.

The usual one has weights that are packed in bfloat16, and as they are in float32. At GPT-2's 124M shape all products of
a step took, on two cores with AMX, in ms:

    rows                    1    2    8   16   32   64  128
    bfloat16, packed       31   32   33   34   42   48   62
    bfloat16, as they are  19   31   33   35   46   60   82
    float32, packed        25   28   33   35   54   91  183
    float32, as they are   26   31   50   48   63   90  156

A single row of bfloat16 is level without AMX. It meets unpacked weights sooner where their rows are long: 768 x 50257
took 2.9 ms and its transpose 4.6 (bfloat16), 3072 x 768 0.36 and 0.25.
"""

INT8_ELEMENTS = 4096
"""Elements of a weight, below which a product is too small for int8 to gain anything."""

INT8_SIDE = 32
"""Columns or rows of a weight, likewise."""
