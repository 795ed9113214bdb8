"""Number formats on the device: rounding, codes, scales and random bits as `formats`, `random` and `Quantizer._scale_of` have them, bit for bit.

All rounding is integer arithmetic on the bits of fp32. Triton's own casts to eight bits are not used: they differ from torch's for some values, between GPUs
and under the interpreter, and there are none that round by chance. Formats and rules are compile-time constants.
"""

# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (kernels are in a language that only looks like Python)

import triton
import triton.language as tl

# Of fp32: everything but the sign; the code of infinity, above which NaNs lie.
MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
NAN_CODE: tl.constexpr = tl.constexpr(0x7F)  # of E4M3 and E5M2
ONE_E4M3: tl.constexpr = tl.constexpr(0x38)
ONE_E8M0: tl.constexpr = tl.constexpr(127)


@triton.jit
def bits_of(x):
    """The bits (int32) of fp32 values."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    """The fp32 values of bits (int32)."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def widened(x):
    """fp32 of fp32, fp16 or bf16 values, exactly: bf16's bits are the upper half of fp32's, and Triton's interpreter would lose its denormal numbers in a cast."""
    if x.dtype == tl.bfloat16:
        return float_of(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """fp32 values rounded to nearest even in DTYPE; for bf16 on the bits, since Triton's interpreter would cut them off."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = bits_of(x)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        even = tl.where((bits & MAGNITUDE) > INFINITY, 0x7FC0, even)
        return even.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def random_bits(key, index):
    """`random.random_bits`: splitmix64's finaliser over key + index (int64), here as uint64, whose shifts are logical and whose products wrap."""
    x = index.to(tl.uint64) * 0x9E3779B97F4A7C15 + key.to(tl.uint64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _with_sign(code, bits, FORMAT: tl.constexpr):
    """Codes of magnitudes, with the sign of `bits` or the code of NaN, as uint8."""
    signed = code | (((bits >> 31) & 1) << (FORMAT.bits - 1))
    none = NAN_CODE if FORMAT.bits == 8 else 0  # E2M1 has no NaN: the scale says it
    return tl.where((bits & MAGNITUDE) > INFINITY, none, signed).to(tl.uint8)


@triton.jit
def nearest_code(x, FORMAT: tl.constexpr, MAX_BITS: tl.constexpr):
    """Codes (uint8) of fp32 values rounded to nearest even, saturating: `encode(round_to(x))`. NaN is the code of NaN, or 0 in E2M1.

    The significand is shifted to whole multiples of the format's spacing at the value, which below the smallest normal number is that number's.
    """
    bits = bits_of(x)
    magnitude = tl.minimum(bits & MAGNITUDE, MAX_BITS)
    exponent = magnitude >> 23
    least: tl.constexpr = FORMAT.min_exponent + 127
    binade = tl.maximum(exponent, least)
    # fp32's denormals get a leading one that they do not have; shifted by 25 or more it is lost, as are they.
    shift = tl.minimum(binade - exponent + (23 - FORMAT.mantissa_bits), 25)
    significand = (magnitude & 0x7FFFFF) | 0x800000
    odd = (significand >> shift) & 1
    whole = (significand + ((1 << (shift - 1)) - 1 + odd)) >> shift
    return _with_sign(((binade - least) << FORMAT.mantissa_bits) + whole, bits, FORMAT)


@triton.jit
def stochastic_code(x, random, FORMAT: tl.constexpr, MAX_BITS: tl.constexpr):
    """Codes (uint8) of fp32 values rounded by chance: `encode(round_stochastic(x, random))`; of `random` (any integers of x's shape) the low bits are used."""
    bits = bits_of(x)
    magnitude = tl.minimum(bits & MAGNITUDE, MAX_BITS)
    least: tl.constexpr = (FORMAT.min_exponent + 127) << 23
    dropped: tl.constexpr = 23 - FORMAT.mantissa_bits
    small = magnitude < least
    # Below the smallest normal number the spacing is that of its binade, into which adding it (rounded once, as the reference does) moves a value.
    moved = tl.where(small, bits_of(float_of(magnitude) + float_of(tl.full(magnitude.shape, least, tl.int32))), magnitude)
    chance = (random & ((1 << dropped) - 1)).to(tl.int32)
    base = tl.where(small, FORMAT.min_exponent + 127, FORMAT.min_exponent + 126) << FORMAT.mantissa_bits
    return _with_sign(((moved + chance) >> dropped) - base, bits, FORMAT)


@triton.jit
def decode(codes, FORMAT: tl.constexpr):
    """fp32 values of codes (uint8), as `formats.decode`; the code of an infinity in E5M2 is one."""
    codes = codes.to(tl.int32)
    magnitude = codes & ((1 << (FORMAT.bits - 1)) - 1)
    exponent = magnitude >> FORMAT.mantissa_bits
    mantissa = magnitude & ((1 << FORMAT.mantissa_bits) - 1)
    small = mantissa.to(tl.float32) * (2.0 ** (FORMAT.min_exponent - FORMAT.mantissa_bits))
    normal = float_of(((exponent + (FORMAT.min_exponent + 126)) << 23) | (mantissa << (23 - FORMAT.mantissa_bits)))
    values = tl.where(exponent == 0, small, normal)
    if FORMAT.bits == 8:
        if FORMAT.mantissa_bits == 2:
            values = tl.where(magnitude == 0x7C, float("inf"), values)
            values = tl.where(magnitude > 0x7C, float("nan"), values)
        else:
            values = tl.where(magnitude == NAN_CODE, float("nan"), values)
    return tl.where((codes >> (FORMAT.bits - 1)) & 1 == 1, -values, values)


@triton.jit
def decode_power(codes):
    """fp32 powers of two of E8M0 codes (uint8): 2^-127, whose code is 0, is a denormal number of fp32."""
    codes = codes.to(tl.int32)
    power = float_of(tl.where(codes == 0, 1 << 22, codes << 23))
    return tl.where(codes == 255, float("nan"), power)


@triton.jit
def power_at_or_below(x):
    """E8M0 codes (int32) of fp32 values that are not negative: `encode_power(x)`. The exponent's own bits, 255 for infinities and NaN."""
    return (bits_of(x) & MAGNITUDE) >> 23


@triton.jit
def power_at_or_above(x):
    """`encode_power(x, up=True)`, int32."""
    bits = bits_of(x) & MAGNITUDE
    exponent = bits >> 23
    # Among denormal numbers only those above 2^-127, code 0, go up to code 1.
    beyond = (bits & 0x7FFFFF) > tl.where(exponent == 0, 1 << 22, 0)
    return tl.where(exponent == 255, 255, tl.minimum(exponent + beyond.to(tl.int32), 254))


@triton.jit
def full_scale(amax, MOST: tl.constexpr):
    """fp32 scales amax / MOST; 1 for zeros, NaN for infinities and NaN.

    Divisions are `div_rn` throughout: Triton's `/` of fp32 is approximate on GPUs (2 ulp), and one last bit of a scale moves values over a tie.
    """
    scale = tl.math.div_rn(amax, tl.full(amax.shape, MOST, tl.float32))
    scale = tl.where(scale == 0, 1.0, scale)
    return tl.where(bits_of(amax) >= INFINITY, float("nan"), scale)


@triton.jit
def power_scale(amax, MOST: tl.constexpr, MOST_BITS: tl.constexpr, UP: tl.constexpr):
    """E8M0 codes (int32) by the floor rule (MOST: the largest power of two in the format) or, with UP, by the ceil rule (MOST: its largest value), as `encode_power`: the
    difference of the bits, without the quotient that fp32 might round.

    Args:
        MOST_BITS: those of MOST.
    """
    bend: tl.constexpr = MOST_BITS - 0x7FFFFF if UP else MOST_BITS
    code = tl.minimum(tl.maximum(((bits_of(amax) - bend) >> 23) + 127, 0), 254)
    code = tl.where(amax > MOST * 2.0**-127, code, 0)
    code = tl.where(bits_of(amax) >= INFINITY, 255, code)
    return tl.where(amax == 0, ONE_E8M0, code)


@triton.jit
def rms_scale(variance, CLIP: tl.constexpr):
    """E8M0 codes (int32) by the rms rule, of fp32 variances; CLIP is how many deviations the format's largest value stands for, over that value."""
    deviation = tl.math.sqrt_rn(variance)
    return tl.where(deviation == 0, ONE_E8M0, power_at_or_below(deviation * CLIP))


@triton.jit
def two_level_scale(amax, whole, MOST: tl.constexpr, E4M3: tl.constexpr, E4M3_MAX_BITS: tl.constexpr):
    """E4M3 codes (uint8) of scales relative to `whole` (fp32, of the tensor), never below the smallest number; 1 for zeros in a tensor that is finite."""
    most = tl.full(amax.shape, MOST, tl.float32)
    code = nearest_code(tl.math.div_rn(tl.math.div_rn(amax, most), tl.zeros_like(amax) + whole), E4M3, E4M3_MAX_BITS)
    code = tl.maximum(code, 1)
    return tl.where((amax == 0) & (bits_of(whole) < INFINITY), ONE_E4M3, code).to(tl.uint8)


@triton.jit
def whole_scale(amax, MOST: tl.constexpr):
    """fp32 scale of a tensor in two_level, of its amax: amax / (448 MOST), 1 where that is 0. NaN stays NaN, an infinity an infinity."""
    scale = tl.math.div_rn(amax, tl.full(amax.shape, MOST * 448.0, tl.float32))
    scale = tl.where(scale == 0, 1.0, scale)
    return tl.where(bits_of(amax) > INFINITY, float("nan"), scale)
