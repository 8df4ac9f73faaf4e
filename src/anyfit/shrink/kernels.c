/* The kernels of exported networks. c.py copies those that a network uses; "kernel NAME: others" says which others one needs.

   Where a multiplier is 1, or numbers are small, 32 bits suffice: c.py derives that form, NAME_32, by replacing int64_t. */

/* kernel requantized */
/* value / 2^shift rounded to the nearest, halves up, and kept within [low, high]. */
static int32_t requantized(int64_t value, int32_t shift, int32_t low, int32_t high)
{
    if (shift > 0) {
        value = (value >> shift) + ((value >> (shift - 1)) & 1);
    }
    return value < low ? low : value > high ? high : (int32_t)value;
}

/* kernel weighted */
/* sum + the products of `size` inputs and weights. */
static int32_t weighted(const int8_t *in, const int8_t *weight, int32_t size, int32_t sum)
{
    for (int32_t i = 0; i < size; i++) {
        sum += (int32_t)in[i] * weight[i];
    }
    return sum;
}

/* kernel taps */
/* The first tap of a window, and the one after its last, that lie on the input rather than on the padding around it. */
static int32_t first_tap(int32_t start, int32_t dilation)
{
    int32_t tap = 0;
    while (start + tap * dilation < 0) {
        tap++;
    }
    return tap;
}

static int32_t end_tap(int32_t start, int32_t dilation, int32_t size, int32_t taps)
{
    while (taps > 0 && start + (taps - 1) * dilation >= size) {
        taps--;
    }
    return taps;
}

/* kernel quantize: requantized */
/* Raw values to int8. Goes forwards, so that a value may be written where the raw one was. */
static void quantize(const raw_value *in, int8_t *out, int32_t size, int32_t multiplier, int64_t offset, int32_t shift,
                     int32_t low, int32_t high)
{
    for (int32_t i = 0; i < size; i++) {
        out[i] = (int8_t)requantized((int64_t)in[i] * multiplier + offset, shift, low, high);
    }
}

/* kernel rounded */
/* x * gain + offset, each rounded to float (volatile: never fused into one), to the nearest of [low, high]; 0 for what is missing. */
static int8_t rounded(float x, float gain, float offset, float low, float high)
{
    const volatile float product = x * gain;
    const volatile float sum = product + offset;
    const float value = sum;
    if (value != value) {
        return 0;
    }
    return (int8_t)((int32_t)((value < low ? low : value > high ? high : value) + 128.5f) - 128);
}

/* kernel quantize_float: rounded */
/* Raw values to int8. Goes forwards, so that a value may be written where the raw one was. */
static void quantize_float(const raw_value *in, int8_t *out, int32_t size, float gain, float offset, float low, float high)
{
    for (int32_t i = 0; i < size; i++) {
        out[i] = rounded(in[i], gain, offset, low, high);
    }
}

/* kernel quantize_columns: rounded */
/* Columns to int8: output i is column source[i], or for a negative one whether column -1 - source[i] is missing (not a number). */
static void quantize_columns(const raw_value *in, int8_t *out, const column_index *source, const float *gain,
                             const float *offset, int32_t size, float low, float high)
{
    for (int32_t i = 0; i < size; i++) {
        const int32_t flag = source[i] < 0;
        const raw_value column = in[flag ? -1 - source[i] : source[i]];
        out[i] = rounded(flag ? (float)(column != column) : column, gain[i], offset[i], low, high);
    }
}

/* kernel convolve: requantized taps */
/* For each output channel, of which `share` read the same `channels` inputs, and each place: a weighted sum over a window. */
static void convolve(const int8_t *in, int8_t *out, const int8_t *weight, const int32_t *bias,
                     const int32_t *multiplier, const int8_t *shift, int32_t outputs, int32_t share, int32_t channels,
                     int32_t height, int32_t width, int32_t out_height, int32_t out_width, int32_t kernel_height,
                     int32_t kernel_width, int32_t stride_y, int32_t stride_x, int32_t top, int32_t left,
                     int32_t dilation_y, int32_t dilation_x, int32_t low, int32_t high)
{
    for (int32_t o = 0; o < outputs; o++) {
        const int8_t *group = in + o / share * channels * height * width;
        for (int32_t y = 0; y < out_height; y++) {
            const int32_t row = y * stride_y - top;
            const int32_t first_y = first_tap(row, dilation_y);
            const int32_t end_y = end_tap(row, dilation_y, height, kernel_height);
            for (int32_t x = 0; x < out_width; x++) {
                const int32_t column = x * stride_x - left;
                const int32_t first_x = first_tap(column, dilation_x);
                const int32_t end_x = end_tap(column, dilation_x, width, kernel_width);
                int32_t sum = bias[o];
                for (int32_t c = 0; c < channels; c++) {
                    for (int32_t j = first_y; j < end_y; j++) {
                        const int32_t line = (c * height + row + j * dilation_y) * width + column;
                        const int8_t *w = weight + (c * kernel_height + j) * kernel_width;
                        for (int32_t i = first_x; i < end_x; i++) {
                            sum += (int32_t)group[line + i * dilation_x] * w[i];
                        }
                    }
                }
                *out++ = (int8_t)requantized((int64_t)sum * multiplier[o], shift[o], low, high);
            }
        }
        weight += channels * kernel_height * kernel_width;
    }
}

/* kernel pointwise: requantized */
/* For each output channel and place: a weighted sum of all channels at that place. */
static void pointwise(const int8_t *in, int8_t *out, const int8_t *weight, const int32_t *bias,
                      const int32_t *multiplier, const int8_t *shift, int32_t outputs, int32_t channels, int32_t area,
                      int32_t low, int32_t high)
{
    for (int32_t o = 0; o < outputs; o++) {
        for (int32_t at = 0; at < area; at++) {
            int32_t sum = bias[o];
            for (int32_t c = 0; c < channels; c++) {
                sum += (int32_t)in[c * area + at] * weight[c];
            }
            *out++ = (int8_t)requantized((int64_t)sum * multiplier[o], shift[o], low, high);
        }
        weight += channels;
    }
}

/* kernel linear: requantized weighted */
/* For each row: a weighted sum of its inputs for each output. */
static void linear(const int8_t *in, int8_t *out, const int8_t *weight, const int32_t *bias, const int32_t *multiplier,
                   const int8_t *shift, int32_t rows, int32_t inputs, int32_t outputs, int32_t low, int32_t high)
{
    for (int32_t row = 0; row < rows; row++) {
        for (int32_t o = 0; o < outputs; o++) {
            const int32_t sum = weighted(in + row * inputs, weight + o * inputs, inputs, bias[o]);
            *out++ = (int8_t)requantized((int64_t)sum * multiplier[o], shift[o], low, high);
        }
    }
}

/* kernel classify: requantized weighted */
/* A linear layer on one row; gives the first output whose sum, before it is made int8, is largest. */
static int32_t classify(const int8_t *in, int8_t *out, const int8_t *weight, const int32_t *bias,
                        const int32_t *multiplier, const int8_t *shift, int32_t inputs, int32_t outputs, int32_t low,
                        int32_t high)
{
    int32_t best = 0;
    int32_t largest = 0;
    for (int32_t o = 0; o < outputs; o++) {
        const int32_t sum = weighted(in, weight + o * inputs, inputs, bias[o]);
        if (o == 0 || sum > largest) {
            largest = sum;
            best = o;
        }
        out[o] = (int8_t)requantized((int64_t)sum * multiplier[o], shift[o], low, high);
    }
    return best;
}

/* kernel largest_of */
/* The first of the largest values. */
static int32_t largest_of(const int8_t *in, int32_t size)
{
    int32_t best = 0;
    for (int32_t i = 1; i < size; i++) {
        if (in[i] > in[best]) {
            best = i;
        }
    }
    return best;
}

/* kernel add: requantized */
/* A weighted sum of two values, which may be written over either. */
static void add(const int8_t *a, const int8_t *b, int8_t *out, int32_t size, int32_t multiplier_a, int32_t multiplier_b,
                int32_t shift, int32_t low, int32_t high)
{
    for (int32_t i = 0; i < size; i++) {
        out[i] = (int8_t)requantized((int64_t)a[i] * multiplier_a + (int64_t)b[i] * multiplier_b, shift, low, high);
    }
}

/* kernel place: requantized */
/* One part of a concatenation: rows of `size` to rows that are `step` apart, on the output's scale. */
static void place(const int8_t *in, int8_t *out, int32_t rows, int32_t size, int32_t step, int32_t multiplier,
                  int32_t shift, int32_t low, int32_t high)
{
    for (int32_t row = 0; row < rows; row++) {
        for (int32_t i = 0; i < size; i++) {
            out[row * step + i] = (int8_t)requantized((int64_t)in[row * size + i] * multiplier, shift, low, high);
        }
    }
}

/* kernel maximum: taps */
/* The largest value of each window, as far as that lies on the input. */
static void maximum(const int8_t *in, int8_t *out, int32_t channels, int32_t height, int32_t width, int32_t out_height,
                    int32_t out_width, int32_t kernel_height, int32_t kernel_width, int32_t stride_y, int32_t stride_x,
                    int32_t top, int32_t left, int32_t dilation_y, int32_t dilation_x)
{
    for (int32_t c = 0; c < channels; c++) {
        for (int32_t y = 0; y < out_height; y++) {
            const int32_t row = y * stride_y - top;
            const int32_t end_y = end_tap(row, dilation_y, height, kernel_height);
            for (int32_t x = 0; x < out_width; x++) {
                const int32_t column = x * stride_x - left;
                const int32_t end_x = end_tap(column, dilation_x, width, kernel_width);
                int8_t best = INT8_MIN;
                for (int32_t j = first_tap(row, dilation_y); j < end_y; j++) {
                    for (int32_t i = first_tap(column, dilation_x); i < end_x; i++) {
                        const int8_t value = in[(row + j * dilation_y) * width + column + i * dilation_x];
                        best = value > best ? value : best;
                    }
                }
                *out++ = best;
            }
        }
        in += height * width;
    }
}

/* kernel average: requantized taps */
/* The sum of each window, scaled; what lies around the input counts as zeros. */
static void average(const int8_t *in, int8_t *out, int32_t channels, int32_t height, int32_t width, int32_t out_height,
                    int32_t out_width, int32_t kernel_height, int32_t kernel_width, int32_t stride_y, int32_t stride_x,
                    int32_t top, int32_t left, int32_t dilation_y, int32_t dilation_x, int32_t multiplier,
                    int32_t shift, int32_t low, int32_t high)
{
    for (int32_t c = 0; c < channels; c++) {
        for (int32_t y = 0; y < out_height; y++) {
            const int32_t row = y * stride_y - top;
            const int32_t end_y = end_tap(row, dilation_y, height, kernel_height);
            for (int32_t x = 0; x < out_width; x++) {
                const int32_t column = x * stride_x - left;
                const int32_t end_x = end_tap(column, dilation_x, width, kernel_width);
                int32_t sum = 0;
                for (int32_t j = first_tap(row, dilation_y); j < end_y; j++) {
                    for (int32_t i = first_tap(column, dilation_x); i < end_x; i++) {
                        sum += in[(row + j * dilation_y) * width + column + i * dilation_x];
                    }
                }
                *out++ = (int8_t)requantized((int64_t)sum * multiplier, shift, low, high);
            }
        }
        in += height * width;
    }
}

/* kernel mean: requantized */
/* The sum over the middle one of three axes, scaled. */
static void mean(const int8_t *in, int8_t *out, int32_t outer, int32_t size, int32_t inner, int32_t multiplier,
                 int32_t shift, int32_t low, int32_t high)
{
    for (int32_t o = 0; o < outer; o++) {
        for (int32_t i = 0; i < inner; i++) {
            int32_t sum = 0;
            for (int32_t k = 0; k < size; k++) {
                sum += in[(o * size + k) * inner + i];
            }
            *out++ = (int8_t)requantized((int64_t)sum * multiplier, shift, low, high);
        }
    }
}

/* kernel most */
/* The largest over the middle one of three axes. */
static void most(const int8_t *in, int8_t *out, int32_t outer, int32_t size, int32_t inner)
{
    for (int32_t o = 0; o < outer; o++) {
        for (int32_t i = 0; i < inner; i++) {
            int8_t best = INT8_MIN;
            for (int32_t k = 0; k < size; k++) {
                const int8_t value = in[(o * size + k) * inner + i];
                best = value > best ? value : best;
            }
            *out++ = best;
        }
    }
}

/* kernel look_up */
/* Each value through a table of 256, which begins with that of -128. */
static void look_up(const int8_t *in, int8_t *out, int32_t size, const int8_t *table)
{
    for (int32_t i = 0; i < size; i++) {
        out[i] = table[in[i] + 128];
    }
}

/* kernel clamp */
/* Each value, kept within [low, high]. */
static void clamp(const int8_t *in, int8_t *out, int32_t size, int8_t low, int8_t high)
{
    for (int32_t i = 0; i < size; i++) {
        out[i] = in[i] < low ? low : in[i] > high ? high : in[i];
    }
}

/* kernel bent */
/* tanh(pre / 256) * 127 by 128 straight pieces between -8 and 8; the curve holds tanh * 32767. */
static int32_t bent(int32_t pre, const int16_t *curve)
{
    const int32_t at = pre + 2048;
    const int16_t *piece = curve + (at >> 5);
    const int32_t value = piece[0] + ((((int32_t)piece[1] - piece[0]) * (at & 31) + 16) >> 5);
    return (value * 127 + 16384) >> 15;
}

/* kernel recur: requantized weighted */
/* states[t] = weight * (x[t], states[t - 1]), of which the latest `kept` are kept; a state before the first is zeros. */
static void recur(const int8_t *in, int8_t *states, const int8_t *weight, const int32_t *bias, const int32_t *multiplier,
                  const int8_t *shift, int32_t steps, int32_t kept, int32_t inputs, int32_t size, int32_t low,
                  int32_t high)
{
    for (int32_t t = 0; t < steps; t++) {
        int8_t *state = states + t % kept * size;
        for (int32_t j = 0; j < size; j++) {
            const int8_t *w = weight + j * (inputs + size);
            int32_t sum = weighted(in + t * inputs, w, inputs, bias[j]);
            if (t > 0) {
                sum = weighted(states + (t - 1) % kept * size, w + inputs, size, sum);
            }
            state[j] = (int8_t)requantized((int64_t)sum * multiplier[j], shift[j], low, high);
        }
    }
}

/* kernel recur_bent: requantized weighted bent */
/* states[t] = tanh(weight * (x[t], states[t - 1])), of which the latest `kept` are kept; a state before the first is zeros. */
static void recur_bent(const int8_t *in, int8_t *states, const int8_t *weight, const int32_t *bias,
                       const int32_t *multiplier, const int8_t *shift, const int16_t *curve, int32_t steps,
                       int32_t kept, int32_t inputs, int32_t size, int32_t low, int32_t high)
{
    for (int32_t t = 0; t < steps; t++) {
        int8_t *state = states + t % kept * size;
        for (int32_t j = 0; j < size; j++) {
            const int8_t *w = weight + j * (inputs + size);
            int32_t sum = weighted(in + t * inputs, w, inputs, bias[j]);
            if (t > 0) {
                sum = weighted(states + (t - 1) % kept * size, w + inputs, size, sum);
            }
            sum = bent(requantized((int64_t)sum * multiplier[j], shift[j], -2048, 2047), curve);
            state[j] = (int8_t)(sum < low ? low : sum > high ? high : sum);
        }
    }
}

/* kernel embed */
/* The row of a table for each id; the first row for an id that is none. */
static void embed(const raw_value *ids, int8_t *out, int32_t count, const int8_t *table, int32_t rows, int32_t size)
{
    for (int32_t i = 0; i < count; i++) {
        const wide_value id = ids[i];
        const int32_t row = id >= 0 && id < (wide_value)rows ? (int32_t)id : 0;
        for (int32_t d = 0; d < size; d++) {
            out[i * size + d] = table[row * size + d];
        }
    }
}
