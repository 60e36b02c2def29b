/* What a picture costs at least, nearly: JPEG bytes in memory to a small RGB picture through libjpeg's own API, in one
 * thread, with nothing of tlx. For measurements only: it trusts its input. x86 with AVX2.
 *
 *   cc -O3 -mavx2 -shared -fPIC -o floor.so floor.c -ljpeg -lm
 *
 * Decode the region that is shown, columns and rows, and stop after its last row; each row is filtered across as it
 * comes, and rows are summed as soon as all that an output row needs are there. Both filters are the triangle as wide as
 * the reduction asks for (antialiased), in 16-bit fixed point.
 */
#include <immintrin.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jpeglib.h>

#define ROWS 8

typedef struct { struct jpeg_error_mgr base; jmp_buf back; } Error;

typedef struct { int n, taps, *low, *count; int16_t *weights; } Filter;

typedef struct {
    struct jpeg_decompress_struct jpeg;
    Error error;
    Filter across, down;
    int16_t *ring;
    uint8_t *rows;
} Floor;

static void on_error(j_common_ptr c) { longjmp(((Error *)c->err)->back, 1); }
static void on_message(j_common_ptr c, int level) { (void)c; (void)level; }

void *floor_new(void)
{
    Floor *f = calloc(1, sizeof *f);
    f->jpeg.err = jpeg_std_error(&f->error.base);
    f->error.base.error_exit = on_error;
    f->error.base.emit_message = on_message;
    jpeg_create_decompress(&f->jpeg);
    return f;
}

static void filter_free(Filter *f)
{
    free(f->low); free(f->count); free(f->weights);
    memset(f, 0, sizeof *f);
}

static void clear(Floor *f)
{
    filter_free(&f->across); filter_free(&f->down);
    free(f->ring); free(f->rows);
    f->ring = NULL; f->rows = NULL;
    jpeg_abort_decompress(&f->jpeg);
}

void floor_free(void *p)
{
    Floor *f = p;
    clear(f);
    jpeg_destroy_decompress(&f->jpeg);
    free(f);
}

int floor_header(void *p, const uint8_t *data, size_t length, int *width, int *height)
{
    Floor *f = p;
    if (setjmp(f->error.back)) { clear(f); return -1; }
    jpeg_mem_src(&f->jpeg, data, length);
    jpeg_read_header(&f->jpeg, TRUE);
    *width = f->jpeg.image_width; *height = f->jpeg.image_height;
    jpeg_abort_decompress(&f->jpeg);
    return 0;
}

/* Of a stretch of `in` source pixels that begins at `from` and is `length` long, to `out` pixels. */
static void filter_make(Filter *f, int out, double from, double length, int in, int mirror)
{
    const double scale = length / out, reach = scale > 1 ? scale : 1;
    f->n = out;
    f->taps = ((int)ceil(reach) * 2 + 2 + 3) & ~3;
    f->low = malloc(sizeof(int) * out);
    f->count = malloc(sizeof(int) * out);
    f->weights = calloc((size_t)out * f->taps, sizeof(int16_t));
    for (int i = 0; i < out; i++) {
        const double centre = from + (i + 0.5) * scale;
        int low = (int)floor(centre - reach + 0.5), high = (int)floor(centre + reach + 0.5), sum = 0;
        const int to = mirror ? out - 1 - i : i;
        double total = 0;
        low = low < 0 ? 0 : low;
        high = high > in ? in : high;
        if (high <= low) { low = low >= in ? in - 1 : low; high = low + 1; }
        if (high - low > f->taps) high = low + f->taps;
        for (int k = low; k < high; k++) total += fmax(1 - fabs(k + 0.5 - centre) / reach, 0);
        f->low[to] = low;
        f->count[to] = high - low;
        for (int k = low; k < high; k++) {
            const double w = total > 0 ? fmax(1 - fabs(k + 0.5 - centre) / reach, 0) / total : k == low;
            sum += f->weights[to * f->taps + k - low] = (int16_t)lrint(w * 16384);
        }
        f->weights[to * f->taps + (high - low) / 2] += 16384 - sum;
    }
}

/* One RGB row to values << 6: four taps a step. */
static void across_row(const Filter *f, const uint8_t *row, int16_t *out)
{
    const __m128i m01 = _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
    const __m128i m23 = _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    for (int i = 0; i < f->n; i++) {
        const uint8_t *q = row + 3 * f->low[i];
        const int16_t *w = f->weights + i * f->taps;
        __m128i sum = _mm_set1_epi32(128);
        for (int k = 0; k < f->count[i]; k += 4, q += 12) {
            const __m128i v = _mm_loadu_si128((const __m128i *)q), four = _mm_loadl_epi64((const __m128i *)(w + k));
            sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_shuffle_epi8(v, m01), _mm_shuffle_epi32(four, 0x00)));
            sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_shuffle_epi8(v, m23), _mm_shuffle_epi32(four, 0x55)));
        }
        sum = _mm_srai_epi32(sum, 8);
        _mm_storel_epi64((__m128i *)(out + 3 * i), _mm_packs_epi32(sum, sum));
    }
}

/* An output row from `count` rows of the ring: two rows a step. */
static void down_rows(const int16_t *ring, size_t stride, int size, int low, int count, const int16_t *w, int length,
                      uint8_t *out)
{
    for (int i = 0; i < length; i += 16) {
        __m256i a = _mm256_set1_epi32(1 << 19), b = a;
        for (int t = 0; t < count; t += 2) {
            const int16_t *first = ring + (size_t)((low + t) % size) * stride + i;
            const int16_t *second = ring + (size_t)((low + t + 1) % size) * stride + i;
            const uint16_t other = (uint16_t)(t + 1 < count ? w[t + 1] : 0);
            const __m256i pair = _mm256_set1_epi32((int)((uint16_t)w[t] | (uint32_t)other << 16));
            const __m256i x = _mm256_loadu_si256((const __m256i *)first);
            const __m256i y = _mm256_loadu_si256((const __m256i *)second);
            a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_unpacklo_epi16(x, y), pair));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_unpackhi_epi16(x, y), pair));
        }
        const __m256i s = _mm256_packs_epi32(_mm256_srai_epi32(a, 20), _mm256_srai_epi32(b, 20));
        const __m128i u = _mm_packus_epi16(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
        if (i + 16 <= length) {
            _mm_storeu_si128((__m128i *)(out + i), u);
        } else {
            uint8_t rest[16];
            _mm_storeu_si128((__m128i *)rest, u);
            memcpy(out + i, rest, length - i);
        }
    }
}

/* box: left, top, width, height in pixels of the picture. out: uint8 [side, side, 3]. least: JPEGs are decoded at 1/2,
 * 1/4 or 1/8 where that leaves `least` times `side` pixels of the box, in both directions; 0 for never. */
static int show(Floor *f, const uint8_t *data, size_t length, const double *box, int side, double least, int mirror,
                uint8_t *out)
{
    struct jpeg_decompress_struct *jpeg = &f->jpeg;
    if (setjmp(f->error.back)) { clear(f); return -1; }
    jpeg_mem_src(jpeg, data, length);
    jpeg_read_header(jpeg, TRUE);
    const double short_side = box[2] < box[3] ? box[2] : box[3];
    int denominator = 1;
    while (least > 0 && denominator < 8 && short_side / (2 * denominator) >= least * side) denominator *= 2;
    jpeg->scale_num = 1;
    jpeg->scale_denom = denominator;
    jpeg->out_color_space = JCS_RGB;
    jpeg->dct_method = JDCT_ISLOW;
    jpeg_start_decompress(jpeg);
    const int width = jpeg->output_width, height = jpeg->output_height;
    const double sx = (double)width / jpeg->image_width, sy = (double)height / jpeg->image_height;
    const double left = box[0] * sx, top = box[1] * sy, w = box[2] * sx, h = box[3] * sy;
    const double reach_x = w / side > 1 ? w / side : 1, reach_y = h / side > 1 ? h / side : 1;
    const int x0 = fmax(floor(left - reach_x), 0), x1 = fmin(ceil(left + w + reach_x), width);
    const int y0 = fmax(floor(top - reach_y), 0), y1 = fmin(ceil(top + h + reach_y), height);
    JDIMENSION from = 0, columns = width;
    if (x0 > 0 || x1 < width) {
        from = x0;
        columns = x1 - x0;
        jpeg_crop_scanline(jpeg, &from, &columns);
    }
    if (y0 > 0) jpeg_skip_scanlines(jpeg, y0);
    const size_t stride = (size_t)jpeg->output_width * 3, wide = (size_t)side * 3 + 32;
    f->rows = calloc(stride * ROWS + 64, 1);
    filter_make(&f->across, side, left - from, w, columns, mirror);
    filter_make(&f->down, side, top, h, height, 0);
    const int size = f->down.taps + ROWS;
    f->ring = calloc((size_t)size * wide, sizeof(int16_t));
    int done = 0, y = y0;
    while (y < y1) {
        JSAMPROW rows[ROWS];
        for (int k = 0; k < ROWS; k++) rows[k] = f->rows + stride * k;
        const int got = jpeg_read_scanlines(jpeg, rows, ROWS);
        for (int k = 0; k < got && y < y1; k++, y++) {
            across_row(&f->across, rows[k], f->ring + (size_t)(y % size) * wide);
            for (; done < side && f->down.low[done] + f->down.count[done] <= y + 1; done++)
                down_rows(f->ring, wide, size, f->down.low[done], f->down.count[done],
                          f->down.weights + done * f->down.taps, side * 3, out + (size_t)done * side * 3);
        }
    }
    clear(f);
    return done < side ? -2 : 0;
}

/* All of them into the same place; how many failed. Every other one is mirrored. */
int floor_many(void *p, int count, const uint8_t **data, const size_t *lengths, const double *boxes, int side,
               double least, uint8_t *out)
{
    int bad = 0;
    for (int i = 0; i < count; i++) bad += show(p, data[i], lengths[i], boxes + 4 * i, side, least, i & 1, out) < 0;
    return bad;
}

int floor_one(void *p, const uint8_t *data, size_t length, const double *box, int side, double least, uint8_t *out)
{
    return show(p, data, length, box, side, least, 0, out);
}
