/* JPEG bytes to a small picture: only the region that is needed is decoded, and resized while it is.
 *
 * Decoder.open reads the header, Decoder.view decodes a crop of the picture, resizes it with an antialiased filter and
 * writes a window of that, rewrite() makes a JPEG cheaper to decode without changing a coefficient. See _jpeg.pyi.
 *
 * The order of work: libjpeg gives a few rows into a ring; as soon as the last row that a row of the output needs is
 * there, the vertical pass makes one row of the crop's width from them, and the horizontal pass writes that row to the
 * output. Weights have 14 bits; both passes round to 8 bits, as Pillow's do. The AVX2 and the plain passes add the same
 * integers, so they give the same bytes.
 *
 * The bytes come from strangers. libjpeg leaves through longjmp, so what has to be freed lies in the Decoder (or in
 * struct transcoder), never in a local variable, and the functions that call setjmp touch no Python object.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000000
#error "tlx.data._jpeg needs libjpeg-turbo 2.0 or newer (Debian: libjpeg-dev, Fedora: libjpeg-turbo-devel)"
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define WITH_AVX2 1
#include <immintrin.h>
#else
#define WITH_AVX2 0
#endif

#define QUOTE_(x) #x
#define QUOTE(x) QUOTE_(x)

enum {
    INTERFACE = 1,        /* what tlx/data/pixels/extension.py asks for; both change when a call or its answer changes */
    LARGEST_SIDE = 65500,           /* libjpeg's own limit */
    LARGEST_RESIZED = 1 << 28, /* of a thin picture, of which only a window is made */
    MOST_SCANS = 500,     /* a progressive picture has about 10; each costs a pass over all coefficients */
    READ_AHEAD = 4,       /* rows asked of libjpeg at a time; it gives one or two */
    SLACK = 64,           /* bytes after a row that the vector code may read or write */
    ASIDE = 8,            /* where a row begins in its cache line. libjpeg-turbo writes a row that is aligned to 16 or 32
                             bytes past the cache (movntdq), and reading it again cost up to 20 % of everything */
    CONTEXT = 4,          /* pixels around the region, so that chroma upsampling sees its neighbours */
    KEEP = 64 << 20       /* bytes: a buffer that grew larger is given back after the picture */
};
#define BITS 14 /* of a weight's fraction */
#define ONE (1 << BITS)
#define HALF (1 << (BITS - 1))

static const char ENDS_EARLY[] = "it ends too early";
static int avx2; /* set once, at import */

/* ---- memory that is kept between pictures ---- */

struct block {
    void *at;
    size_t size;
};

static int reserve(struct block *b, size_t size) {
    if (size <= b->size)
        return 1;
    PyMem_RawFree(b->at);
    b->size = 0;
    b->at = PyMem_RawMalloc(size);
    if (!b->at)
        return 0;
    b->size = size;
    return 1;
}

static void release(struct block *b) {
    PyMem_RawFree(b->at);
    b->at = NULL;
    b->size = 0;
}

/* ---- libjpeg's errors and its source of bytes ---- */

struct failure {
    struct jpeg_error_mgr mgr;
    jmp_buf back;
    int strict;    /* a warning is an error */
    int no_memory; /* MemoryError, not ValueError */
    char reason[JMSG_LENGTH_MAX];
};

static void leave(j_common_ptr c, const char *reason) {
    struct failure *f = (struct failure *)c->err;
    snprintf(f->reason, sizeof f->reason, "%s", reason);
    longjmp(f->back, 1);
}

static void on_error(j_common_ptr c) {
    struct failure *f = (struct failure *)c->err;
    char message[JMSG_LENGTH_MAX];
    switch (c->err->msg_code) {
    case JERR_BAD_PRECISION:
        leave(c, "only 8 bits per sample are supported");
        break;
    case JERR_OUT_OF_MEMORY:
        f->no_memory = 1;
        break;
    default:
        break;
    }
    c->err->format_message(c, message);
    leave(c, message);
}

static void on_message(j_common_ptr c, int level) {
    if (level >= 0)
        return;
    c->err->num_warnings++;
    if (((struct failure *)c->err)->strict)
        on_error(c);
}

static void no_output(j_common_ptr c) { (void)c; }

static void on_progress(j_common_ptr c) {
    if (c->is_decompressor && ((j_decompress_ptr)c)->input_scan_number > MOST_SCANS)
        leave(c, "more than 500 scans");
}

static struct jpeg_error_mgr *failure_init(struct failure *f) {
    jpeg_std_error(&f->mgr);
    f->mgr.error_exit = on_error;
    f->mgr.emit_message = on_message;
    f->mgr.output_message = no_output;
    return &f->mgr;
}

/* jpeg_source_mgr over memory; `skipped` counts the restart markers before the place where decoding begins */
struct source {
    struct jpeg_source_mgr mgr;
    int skipped;
};

static void source_nothing(j_decompress_ptr d) { (void)d; }

static boolean source_empty(j_decompress_ptr d) {
    leave((j_common_ptr)d, ENDS_EARLY);
    return FALSE;
}

static void source_skip(j_decompress_ptr d, long n) {
    if (n <= 0)
        return;
    if ((unsigned long)n > d->src->bytes_in_buffer)
        leave((j_common_ptr)d, ENDS_EARLY);
    d->src->next_input_byte += n;
    d->src->bytes_in_buffer -= (size_t)n;
}

/* libjpeg numbers restart markers from the place where it begins */
static boolean source_resync(j_decompress_ptr d, int desired) {
    desired = (desired + ((struct source *)d->src)->skipped) & 7;
    if (d->unread_marker == JPEG_RST0 + desired) {
        d->unread_marker = 0;
        return TRUE;
    }
    return jpeg_resync_to_restart(d, desired);
}

static void source_set(j_decompress_ptr d, struct source *s, const void *data, size_t size) {
    s->mgr.init_source = source_nothing;
    s->mgr.fill_input_buffer = source_empty;
    s->mgr.skip_input_data = source_skip;
    s->mgr.resync_to_restart = source_resync;
    s->mgr.term_source = source_nothing;
    s->mgr.next_input_byte = data;
    s->mgr.bytes_in_buffer = size;
    s->skipped = 0;
    d->src = &s->mgr;
}

/* what both Decoder.open and rewrite() refuse, after jpeg_read_header */
static void check_kind(j_decompress_ptr d) {
    j_common_ptr c = (j_common_ptr)d;
    double blocks = 0;
    int k;
    if (d->arith_code)
        leave(c, "arithmetic coding is not supported");
    if (d->data_precision != 8)
        leave(c, "only 8 bits per sample are supported");
    if (!d->progressive_mode && d->Ss != 0 && d->Se == 0)
        leave(c, "lossless coding is not supported");
    if (d->num_components != 1 && d->num_components != 3 && d->num_components != 4)
        leave(c, "it has neither 1, 3 nor 4 components");
    if (d->image_width > LARGEST_SIDE || d->image_height > LARGEST_SIDE)
        leave(c, "it is wider or higher than 65500 pixels");
    /* Huffman's shortest code has one bit: a small file cannot make us take memory for a large picture */
    for (k = 0; k < d->num_components; k++)
        blocks += (double)d->comp_info[k].width_in_blocks * d->comp_info[k].height_in_blocks;
    if (blocks > 8.0 * (double)d->src->bytes_in_buffer)
        leave(c, ENDS_EARLY);
}

/* ---- the filter ---- */

/* For each row (or column) of the window: `count` source rows from `low` on, and their weights, which add up to ONE.
 * Positions are relative to the first pixel that the crop touches. */
struct filter {
    int n;      /* rows of the window */
    int taps;   /* the largest count */
    int stride; /* weights from one row to the next; an odd count has a 0 behind it */
    int first, last; /* source positions: first one used, one after the last */
    int identity;    /* every row is one source row, in order */
    int32_t *low, *count;
    int16_t *weights;
    struct block memory;
};

static double triangle(double x) {
    x = fabs(x);
    return x < 1 ? 1 - x : 0;
}

static double cubic(double x) { /* Pillow's BICUBIC: Keys, a = -0.5 */
    const double a = -0.5;
    x = fabs(x);
    if (x < 1)
        return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/* The window [from, from + n) of a crop `length` pixels long that is resized to `resized`; the crop begins at `start` in
 * `available` pixels. As Pillow's precompute_coeffs. Returns 0 when there is no memory. */
static int filter_make(struct filter *f, int from, int n, int resized, double start, double length, int available,
                       int bicubic, int reverse) {
    double scale = length / resized, stretch = scale > 1 ? scale : 1, support = (bicubic ? 2 : 1) * stretch;
    double inverse = 1 / stretch;
    int most = (int)ceil(support) * 2 + 1, stride, i, k;
    size_t weights, scratch;
    double *values;
    if (most > available)
        most = available;
    stride = (most + 1) & ~1;
    weights = (size_t)n * (size_t)stride;
    scratch = (size_t)most * sizeof(double);
    if (!reserve(&f->memory, scratch + (size_t)n * 2 * sizeof(int32_t) + weights * sizeof(int16_t)))
        return 0;
    values = f->memory.at;
    f->low = (int32_t *)(values + most);
    f->count = f->low + n;
    f->weights = (int16_t *)(f->count + n);
    f->n = n;
    f->stride = stride;
    f->taps = 1;
    f->first = INT_MAX;
    f->last = 0;
    f->identity = 1;
    for (i = 0; i < n; i++) {
        int at = reverse ? n - 1 - i : i, low, high, head, tail, before;
        double center = start + (from + i + 0.5) * scale, total = 0, sum;
        int16_t *w = f->weights + (size_t)at * (size_t)stride;
        low = (int)(center - support + 0.5);
        high = (int)(center + support + 0.5);
        if (low < 0)
            low = 0;
        if (high > available)
            high = available;
        if (low >= high) /* rounding, at the very edge */
            low = high > 0 ? high - 1 : 0, high = low + 1;
        if (high - low > most)
            high = low + most;
        for (k = 0; k < high - low; k++) {
            double x = (k + low - center + 0.5) * inverse;
            values[k] = bicubic ? cubic(x) : triangle(x);
            total += values[k];
        }
        if (total == 0)
            values[0] = total = 1;
        /* rounding the running sum: the weights add up to ONE however many and small they are */
        total = ONE / total;
        sum = 0.5 + 2 * ONE; /* kept positive, so that the cast rounds down */
        before = 2 * ONE;
        head = high - low;
        tail = 0;
        for (k = 0; k < high - low; k++) {
            int now;
            sum += values[k] * total;
            now = k + 1 < high - low ? (int)sum : 3 * ONE;
            w[k] = (int16_t)(now - before);
            before = now;
            if (w[k]) {
                tail = k + 1;
                if (k < head)
                    head = k;
            }
        }
        if (head > 0)
            memmove(w, w + head, (size_t)(tail - head) * sizeof *w);
        if ((tail - head) & 1)
            w[tail - head] = 0;
        f->low[at] = low + head;
        f->count[at] = tail - head;
        if (f->taps < tail - head)
            f->taps = tail - head;
        if (f->first > low + head)
            f->first = low + head;
        if (f->last < low + tail)
            f->last = low + tail;
    }
    for (i = 0; i < n && f->identity; i++)
        f->identity = f->count[i] == 1 && f->low[i] == f->low[0] + i;
    return 1;
}

static uint8_t clip(int32_t sum) {
    sum = (sum + HALF) >> BITS;
    return (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

/* ---- the vertical pass: one row from `count` rows ---- */

static void vertical_plain(const uint8_t *const *rows, const int16_t *weights, int count, size_t size, int32_t *sums,
                           uint8_t *out) {
    size_t i;
    int k;
    for (i = 0; i < size; i++)
        sums[i] = weights[0] * rows[0][i];
    for (k = 1; k < count; k++) {
        const uint8_t *row = rows[k];
        const int32_t w = weights[k];
        for (i = 0; i < size; i++)
            sums[i] += w * row[i];
    }
    for (i = 0; i < size; i++)
        out[i] = clip(sums[i]);
}

/* ---- the horizontal pass: one row of `n` pixels ---- */

static void horizontal_plain(const struct filter *f, const uint8_t *row, int origin, int channels, uint8_t *out) {
    int i, k, c;
    for (i = 0; i < f->n; i++) {
        const uint8_t *p = row + (size_t)(f->low[i] - origin) * (size_t)channels;
        const int16_t *w = f->weights + (size_t)i * (size_t)f->stride;
        int32_t sums[3] = {0, 0, 0};
        for (k = 0; k < f->count[i]; k++)
            for (c = 0; c < channels; c++)
                sums[c] += w[k] * *p++;
        for (c = 0; c < channels; c++)
            *out++ = clip(sums[c]);
    }
}

#if WITH_AVX2
/* The same sums, 64 samples at a time; pairs of rows are interleaved for madd, which multiplies and adds two. An odd
 * count has a weight of 0 behind it, and any row. */
__attribute__((target("avx2"))) static inline void add_pair(__m256i sums[4], __m256i x, __m256i y, __m256i w) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i low = _mm256_unpacklo_epi8(x, y), high = _mm256_unpackhi_epi8(x, y);
    sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), w));
    sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), w));
    sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), w));
    sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), w));
}

__attribute__((target("avx2"))) static inline __m256i rounded(const __m256i sums[4]) {
    return _mm256_packus_epi16(
        _mm256_packs_epi32(_mm256_srai_epi32(sums[0], BITS), _mm256_srai_epi32(sums[1], BITS)),
        _mm256_packs_epi32(_mm256_srai_epi32(sums[2], BITS), _mm256_srai_epi32(sums[3], BITS)));
}

__attribute__((target("avx2"))) static void vertical_avx2(const uint8_t *const *rows, const int16_t *weights, int count,
                                                          size_t size, uint8_t *out) {
    const __m256i half = _mm256_set1_epi32(HALF);
    size_t i;
    int k;
    for (i = 0; i < size; i += 64) {
        __m256i a[4] = {half, half, half, half}, b[4] = {half, half, half, half};
        for (k = 0; k < count; k += 2) {
            const __m256i *x = (const __m256i *)(rows[k] + i), *y = (const __m256i *)(rows[k + 1] + i);
            int32_t pair;
            __m256i w;
            memcpy(&pair, weights + k, sizeof pair);
            w = _mm256_set1_epi32(pair);
            add_pair(a, _mm256_loadu_si256(x), _mm256_loadu_si256(y), w);
            add_pair(b, _mm256_loadu_si256(x + 1), _mm256_loadu_si256(y + 1), w);
        }
        _mm256_storeu_si256((__m256i *)(out + i), rounded(a));
        _mm256_storeu_si256((__m256i *)(out + i + 32), rounded(b));
    }
}

/* The weights of `across` in the order in which the vector code reads them.
 * 3 channels: groups of 4 pixels; for each step of 4 taps the weights of pixels 0 and 2, taps 0 and 1, then 2 and 3, then
 * those of pixels 1 and 3; every pair of weights four times, for R, G, B and nothing. 1 channel: steps of 8 taps.
 * A pixel begins further left where its padded taps would reach over the end of the row. */
struct lanes {
    int steps;
    int32_t *at; /* byte offset of a pixel's first tap */
    int16_t *weights;
    struct block memory;
};

static int lanes_make(struct lanes *l, const struct filter *f, int channels) {
    const int per = channels == 3 ? 4 : 8, steps = (f->taps + per - 1) / per, n = (f->n + 3) & ~3;
    const size_t each = (size_t)steps * (channels == 3 ? 16 : 8); /* int16 for one pixel */
    int i, k;
    if (!reserve(&l->memory, 32 + (size_t)n * each * sizeof(int16_t) + (size_t)n * sizeof(int32_t)))
        return 0;
    l->steps = steps;
    l->weights = (int16_t *)(((uintptr_t)l->memory.at + 31) & ~(uintptr_t)31);
    l->at = (int32_t *)(l->weights + (size_t)n * each);
    memset(l->weights, 0, (size_t)n * each * sizeof(int16_t));
    for (i = 0; i < n; i++) {
        const int16_t *w = f->weights + (size_t)i * (size_t)f->stride;
        int low, from;
        if (i >= f->n) {
            l->at[i] = 0;
            continue;
        }
        low = f->low[i];
        if (low > f->last - steps * per)
            low = f->last - steps * per;
        if (low < f->first)
            low = f->first;
        from = f->low[i] - low;
        l->at[i] = (low - f->first) * channels;
        if (channels == 1)
            memcpy(l->weights + (size_t)i * each + from, w, (size_t)f->count[i] * sizeof *w);
        else {
            int16_t *to = l->weights + (size_t)(i >> 2) * 4 * each + ((i & 1) * 32) + ((i >> 1 & 1) * 8);
            for (k = 0; k < f->count[i]; k++) {
                const int tap = from + k;
                int16_t *t = to + (size_t)(tap >> 2) * 64 + (tap >> 1 & 1) * 16 + (tap & 1);
                t[0] = t[2] = t[4] = t[6] = w[k];
            }
        }
    }
    return 1;
}

__attribute__((target("avx2"))) static inline __m256i two_pixels(const uint8_t *p, const uint8_t *q) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p)),
                                   _mm_loadu_si128((const __m128i *)q), 1);
}

__attribute__((target("avx2"))) static void horizontal_avx2_rgb(const struct lanes *l, const uint8_t *row, int n,
                                                                uint8_t *out) {
    const __m256i first = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, 0, -1, 3, -1, 1, -1,
                                           4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
    const __m256i second = _mm256_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1, 6, -1, 9, -1, 7,
                                            -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m256i close_up = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1, 2, 4, 5, 6,
                                              -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i *w = (const __m256i *)l->weights;
    const __m256i half = _mm256_set1_epi32(HALF);
    int i, k;
    for (i = 0; i < n; i += 4) {
        const uint8_t *p0 = row + l->at[i], *p1 = row + l->at[i + 1], *p2 = row + l->at[i + 2], *p3 = row + l->at[i + 3];
        __m256i a = half, b = half, v;
        for (k = 0; k < l->steps; k++, w += 4, p0 += 12, p1 += 12, p2 += 12, p3 += 12) {
            v = two_pixels(p0, p2);
            a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_shuffle_epi8(v, first), _mm256_load_si256(w)));
            a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_shuffle_epi8(v, second), _mm256_load_si256(w + 1)));
            v = two_pixels(p1, p3);
            b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_shuffle_epi8(v, first), _mm256_load_si256(w + 2)));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_shuffle_epi8(v, second), _mm256_load_si256(w + 3)));
        }
        a = _mm256_packs_epi32(_mm256_srai_epi32(a, BITS), _mm256_srai_epi32(b, BITS));
        a = _mm256_shuffle_epi8(_mm256_packus_epi16(a, a), close_up);
        if (i + 5 <= n) { /* 14 bytes are written, 12 of them meant */
            _mm_storel_epi64((__m128i *)(out + 3 * i), _mm256_castsi256_si128(a));
            _mm_storel_epi64((__m128i *)(out + 3 * i + 6), _mm256_extracti128_si256(a, 1));
        } else {
            uint8_t end[16];
            _mm_storel_epi64((__m128i *)end, _mm256_castsi256_si128(a));
            _mm_storel_epi64((__m128i *)(end + 6), _mm256_extracti128_si256(a, 1));
            memcpy(out + 3 * i, end, 3 * (size_t)(n - i < 4 ? n - i : 4));
        }
    }
}

__attribute__((target("avx2"))) static void horizontal_avx2_grey(const struct lanes *l, const uint8_t *row, int n,
                                                                 uint8_t *out) {
    const __m128i *w = (const __m128i *)l->weights;
    int i, j, k;
    for (i = 0; i < n; i += 4) {
        __m128i sums[4];
        int32_t four;
        for (j = 0; j < 4; j++) {
            const uint8_t *p = row + l->at[i + j];
            __m128i sum = _mm_setzero_si128();
            for (k = 0; k < l->steps; k++, p += 8)
                sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)p)),
                                                        _mm_load_si128(w++)));
            sums[j] = sum;
        }
        sums[0] = _mm_hadd_epi32(_mm_hadd_epi32(sums[0], sums[1]), _mm_hadd_epi32(sums[2], sums[3]));
        sums[0] = _mm_srai_epi32(_mm_add_epi32(sums[0], _mm_set1_epi32(HALF)), BITS);
        sums[0] = _mm_packs_epi32(sums[0], sums[0]);
        four = _mm_cvtsi128_si32(_mm_packus_epi16(sums[0], sums[0]));
        memcpy(out + i, &four, (size_t)(n - i < 4 ? n - i : 4));
    }
}
#endif

/* ---- one decoder ---- */

typedef struct {
    PyObject_HEAD
    struct jpeg_decompress_struct d;
    struct failure failure;
    struct source source;
    struct jpeg_progress_mgr progress;
    Py_buffer data;
    int created, holds, ready, busy;
    long warned; /* libjpeg's warnings by the end of the header */
    const uint8_t *scan; /* the first byte of the first scan */
    struct filter across, down;
#if WITH_AVX2
    struct lanes lanes;
#endif
    struct block ring, row, sums, pointers;
} Decoder;

struct view {
    uint8_t *out;
    int channels; /* of out */
    int left, top, width, height;
    int resized_width, resized_height;
    int window_left, window_top, window_width, window_height;
    int bicubic, mirror, flip;
    double least;
    int denominator;
};

/* Free the buffers that are larger than `size` bytes */
static void give_back(Decoder *self, size_t size) {
    struct block *all[] = {&self->ring,          &self->row,         &self->sums, &self->pointers,
                           &self->across.memory, &self->down.memory,
#if WITH_AVX2
                           &self->lanes.memory
#endif
    };
    size_t i;
    for (i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i]->size > size)
            release(all[i]);
}

static void let_go(Decoder *self) {
    self->ready = 0;
    if (self->created)
        jpeg_abort_decompress(&self->d);
    if (self->holds) {
        self->holds = 0;
        PyBuffer_Release(&self->data);
    }
}

static int decoder_create(Decoder *self) {
    self->d.err = failure_init(&self->failure);
    if (setjmp(self->failure.back))
        return 0;
    jpeg_create_decompress(&self->d);
    self->created = 1;
    self->progress.progress_monitor = on_progress;
    self->d.progress = &self->progress;
    return 1;
}

static int decoder_header(Decoder *self) {
    j_decompress_ptr d = &self->d;
    const uint8_t *p;
    if (setjmp(self->failure.back))
        return 0;
    source_set(d, &self->source, self->data.buf, (size_t)self->data.len);
    jpeg_read_header(d, TRUE);
    check_kind(d);
    self->scan = self->source.mgr.next_input_byte;
    self->warned = d->err->num_warnings;
    for (p = (const uint8_t *)self->data.buf + self->data.len - 2; p >= self->scan; p--)
        if (p[0] == 0xFF && p[1] == JPEG_EOI)
            return 1;
    leave((j_common_ptr)d, ENDS_EARLY);
    return 0;
}

/* Some of the coefficients of a progressive picture are not there: libjpeg then smooths between blocks, also across the
 * edges of a region. */
static int is_smoothed(j_decompress_ptr d) {
    int c, k;
    if (!d->progressive_mode || !d->coef_bits)
        return 0;
    for (c = 0; c < d->num_components; c++)
        for (k = 0; k < 64; k++)
            if (d->coef_bits[c][k] != 0)
                return 1;
    return 0;
}

/* Where restart markers stand at the ends of rows of MCUs (rewrite() puts them there), decoding can begin at any of them,
 * and what lies above is not even entropy-decoded: to libjpeg the picture then begins there. `row` is the first one
 * needed; returns the number of rows left out. After a restart nothing depends on what was before. */
static int begin_at_restart(Decoder *self, int row) {
    j_decompress_ptr d = &self->d;
    const int high = 8 * d->max_v_samp_factor, wide = 8 * d->max_h_samp_factor;
    const unsigned across = (d->image_width + (unsigned)wide - 1) / (unsigned)wide; /* MCUs in a row */
    const uint8_t *p = self->scan, *end = (const uint8_t *)self->data.buf + self->data.len;
    int markers, rows, k;
    if (d->progressive_mode || d->comps_in_scan != d->num_components || (d->num_components == 1 && high * wide > 64) ||
        !d->restart_interval || d->restart_interval % across)
        return 0;
    rows = (int)(d->restart_interval / across); /* of MCUs, between two markers */
    markers = row / (rows * high);
    for (k = 0; k < markers; p++) {
        p = memchr(p, 0xFF, (size_t)(end - p));
        if (!p || end - p < 2)
            return 0;
        if (p[1] == 0xFF) /* a fill byte */
            continue;
        p++;
        if (*p == JPEG_RST0 + (k & 7))
            k++;
        else if (*p)
            return 0; /* damaged: libjpeg knows better */
    }
    if (!markers)
        return 0;
    self->source.mgr.next_input_byte = p;
    self->source.mgr.bytes_in_buffer = (size_t)(end - p);
    self->source.skipped = markers;
    rows *= markers;
    d->image_height -= (JDIMENSION)(rows * high);
    d->total_iMCU_rows -= (JDIMENSION)rows;
    for (k = 0; k < d->num_components; k++)
        d->comp_info[k].height_in_blocks -= (JDIMENSION)(rows * d->comp_info[k].v_samp_factor);
    return rows * high;
}

static int decoder_view(Decoder *self, struct view *v) {
    j_decompress_ptr d = &self->d;
    struct filter *across = &self->across, *down = &self->down;
    int s, left, top, right, bottom, channels, y, i, k, done, highest, slots;
    int x0, origin;
    size_t stride, used, begin;
    JDIMENSION offset, width;
    uint8_t *ring, *row;
    const uint8_t **rows;

    if (setjmp(self->failure.back))
        return 0;
    for (s = 8; s > 1; s /= 2)
        if (v->least > 0 && v->width >= v->least * s * v->resized_width &&
            v->height >= v->least * s * v->resized_height)
            break;
    v->denominator = s;
    channels = v->channels == 3 && d->num_components == 3 ? 3 : 1;
    d->scale_num = 1;
    d->scale_denom = (unsigned)s;
    d->out_color_space = channels == 3 ? JCS_RGB : JCS_GRAYSCALE;
    d->dct_method = JDCT_ISLOW;
    d->do_fancy_upsampling = TRUE;

    /* the crop in pixels of the scaled picture, and the pixels that it touches */
    left = v->left / s;
    top = v->top / s;
    right = (v->left + v->width + s - 1) / s;
    bottom = (v->top + v->height + s - 1) / s;
    if (!filter_make(across, v->window_left, v->window_width, v->resized_width, (double)v->left / s - left,
                     (double)v->width / s, right - left, v->bicubic, v->mirror) ||
        !filter_make(down, v->window_top, v->window_height, v->resized_height, (double)v->top / s - top,
                     (double)v->height / s, bottom - top, v->bicubic, 0)) {
        self->failure.no_memory = 1;
        return 0;
    }
#if WITH_AVX2
    if (avx2 && !across->identity && !lanes_make(&self->lanes, across, channels)) {
        self->failure.no_memory = 1;
        return 0;
    }
#endif

    y = top + down->first - CONTEXT;
    if (y > 0) {
        k = begin_at_restart(self, y * s) / s;
        top -= k;
        bottom -= k;
    }
    jpeg_start_decompress(d);
    if (d->output_components != channels || right > (int)d->output_width || bottom > (int)d->output_height)
        leave((j_common_ptr)d, "libjpeg gives another size than it announced");
    x0 = left + across->first - CONTEXT;
    offset = x0 > 0 ? (JDIMENSION)x0 : 0;
    width = (JDIMENSION)(left + across->last + CONTEXT);
    if (width > d->output_width)
        width = d->output_width;
    width -= offset;
    y = 0;
    if (is_smoothed(d) || (d->num_components == 1 && (d->max_h_samp_factor > 1 || d->max_v_samp_factor > 1)))
        offset = 0; /* rare, and not exact in every libjpeg-turbo */
    else {
        if (width < d->output_width)
            jpeg_crop_scanline(d, &offset, &width);
        if (top + down->first > 0)
            y = (int)jpeg_skip_scanlines(d, (JDIMENSION)(top + down->first));
    }
    origin = left + across->first - (int)offset; /* of the columns used, in a row of the ring */
    used = (size_t)(across->last - across->first) * (size_t)channels;
    /* whole cache lines, an odd number of them: rows that lie below each other must not share a place in the cache */
    stride = ((ASIDE + (size_t)d->output_width * (size_t)channels + SLACK + 63) / 64 | 1) * 64;
    begin = (ASIDE + (size_t)origin * (size_t)channels) % 64; /* so that the vertical pass reads whole lines */

    slots = 1;
    for (highest = 0, i = 0; i < down->n; i++) {
        if (highest < down->low[i] + down->count[i])
            highest = down->low[i] + down->count[i];
        if (slots < highest + READ_AHEAD - down->low[i])
            slots = highest + READ_AHEAD - down->low[i];
    }
    if (!reserve(&self->ring, (size_t)slots * stride + 63) || !reserve(&self->row, begin + used + SLACK) ||
        !reserve(&self->pointers, ((size_t)down->taps + 1) * sizeof *rows) ||
        !reserve(&self->sums, (begin + used) * sizeof(int32_t))) {
        self->failure.no_memory = 1;
        return 0;
    }
    ring = (uint8_t *)(((uintptr_t)self->ring.at + 63) & ~(uintptr_t)63) + ASIDE;
    row = self->row.at;
    rows = self->pointers.at;

    for (done = 0; done < down->n; done++) {
        const int low = top + down->low[done], count = down->count[done];
        const int16_t *weights = down->weights + (size_t)done * (size_t)down->stride;
        const uint8_t *from = row;
        uint8_t *out = v->out + (size_t)(v->flip ? down->n - 1 - done : done) * (size_t)across->n * (size_t)v->channels;
        while (y < low + count) {
            JSAMPROW into[READ_AHEAD];
            JDIMENSION got;
            for (k = 0; k < READ_AHEAD; k++)
                into[k] = ring + (size_t)((y + k) % slots) * stride;
            got = jpeg_read_scanlines(d, into, READ_AHEAD);
            if (!got)
                leave((j_common_ptr)d, ENDS_EARLY);
            y += (int)got;
        }
        for (k = 0; k < count; k++)
            rows[k] = ring + (size_t)((low + k) % slots) * stride + (size_t)origin * (size_t)channels - begin;
        rows[count] = rows[0];
        if (count == 1) /* its weight is ONE */
            from = rows[0];
#if WITH_AVX2
        else if (avx2)
            vertical_avx2(rows, weights, count, begin + used, row);
#endif
        else
            vertical_plain(rows, weights, count, begin + used, self->sums.at, row);
        from += begin;
        if (across->identity)
            memcpy(out, from, used);
#if WITH_AVX2
        else if (avx2 && channels == 3)
            horizontal_avx2_rgb(&self->lanes, from, across->n, out);
        else if (avx2)
            horizontal_avx2_grey(&self->lanes, from, across->n, out);
#endif
        else
            horizontal_plain(across, from, across->first, channels, out);
        if (v->channels > channels)
            for (k = across->n - 1; k >= 0; k--)
                out[3 * k] = out[3 * k + 1] = out[3 * k + 2] = out[k];
    }
    if (d->err->num_warnings > self->warned)
        leave((j_common_ptr)d, "damaged: libjpeg had to guess");
    return 1;
}

/* ---- Python's side of Decoder ---- */

static PyObject *raise_failure(struct failure *f) {
    if (f->no_memory) {
        f->no_memory = 0;
        return PyErr_NoMemory();
    }
    PyErr_SetString(PyExc_ValueError, f->reason);
    return NULL;
}

static int enter(Decoder *self) {
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "this Decoder is in use in another thread; make one for each thread");
        return 0;
    }
    self->busy = 1;
    return 1;
}

static PyObject *Decoder_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    Decoder *self;
    if ((args && PyTuple_GET_SIZE(args)) || (kwargs && PyDict_GET_SIZE(kwargs))) {
        PyErr_SetString(PyExc_TypeError, "Decoder() takes no arguments");
        return NULL;
    }
    self = (Decoder *)type->tp_alloc(type, 0);
    if (self && !decoder_create(self)) {
        PyErr_Format(PyExc_RuntimeError, "libjpeg: %s", self->failure.reason);
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void Decoder_dealloc(Decoder *self) {
    PyTypeObject *type = Py_TYPE(self);
    let_go(self);
    if (self->created)
        jpeg_destroy_decompress(&self->d);
    give_back(self, 0);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyObject *Decoder_open(Decoder *self, PyObject *data) {
    int ok;
    if (!enter(self))
        return NULL;
    let_go(self);
    if (PyObject_GetBuffer(data, &self->data, PyBUF_SIMPLE) < 0) {
        self->busy = 0;
        return NULL;
    }
    self->holds = 1;
    /* a libjpeg object keeps tables from picture to picture, and what a damaged one shows would depend on the last one */
    jpeg_destroy_decompress(&self->d);
    self->created = 0;
    ok = decoder_create(self) && decoder_header(self);
    self->ready = ok;
    if (!ok)
        let_go(self);
    self->busy = 0;
    if (!ok)
        return raise_failure(&self->failure);
    return Py_BuildValue("(iii)", (int)self->d.image_width, (int)self->d.image_height, self->d.num_components);
}

static const char *impossible(const Decoder *self, struct view *v, Py_ssize_t size) {
    const int width = (int)self->d.image_width, height = (int)self->d.image_height;
    Py_ssize_t pixels;
    if (self->d.num_components == 4)
        return "four components (CMYK) are not supported";
    if (v->width < 1 || v->height < 1 || v->left < 0 || v->top < 0 || v->left > width - v->width ||
        v->top > height - v->height)
        return "the crop is not inside the picture";
    if (v->resized_width < 1 || v->resized_height < 1 || v->resized_width > LARGEST_RESIZED ||
        v->resized_height > LARGEST_RESIZED)
        return "the resized crop must have 1 to 65500 pixels a side";
    if (v->window_width < 1 || v->window_height < 1 || v->window_left < 0 || v->window_top < 0 ||
        v->window_left > v->resized_width - v->window_width || v->window_top > v->resized_height - v->window_height)
        return "the window is not inside the resized crop";
    pixels = (Py_ssize_t)v->window_width * v->window_height;
    if (size != pixels && size != 3 * pixels)
        return "out has not the bytes of the window, with 1 or 3 channels";
    if (!(v->least >= 0 && v->least <= 1e6))
        return "least must be 0 or a positive number";
    v->channels = size == pixels ? 1 : 3;
    return NULL;
}

static PyObject *Decoder_view(Decoder *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"out", "crop", "resized", "window", "bicubic", "mirror", "flip", "least", NULL};
    struct view v = {0};
    Py_buffer out;
    const char *wrong;
    int ok = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "w*(iiii)(ii)(iiii)|$pppd:view", names, &out, &v.left, &v.top,
                                     &v.width, &v.height, &v.resized_width, &v.resized_height, &v.window_left,
                                     &v.window_top, &v.window_width, &v.window_height, &v.bicubic, &v.mirror, &v.flip,
                                     &v.least))
        return NULL;
    if (!enter(self)) {
        PyBuffer_Release(&out);
        return NULL;
    }
    v.out = out.buf;
    wrong = self->ready ? impossible(self, &v, out.len) : "no picture is open";
    if (!wrong) {
        Py_BEGIN_ALLOW_THREADS
        ok = decoder_view(self, &v);
        Py_END_ALLOW_THREADS
    }
    let_go(self);
    give_back(self, KEEP);
    self->busy = 0;
    PyBuffer_Release(&out);
    if (wrong) {
        PyErr_SetString(PyExc_ValueError, wrong);
        return NULL;
    }
    return ok ? PyLong_FromLong(v.denominator) : raise_failure(&self->failure);
}

static PyObject *Decoder_close(Decoder *self, PyObject *unused) {
    (void)unused;
    if (!enter(self))
        return NULL;
    let_go(self);
    self->busy = 0;
    Py_RETURN_NONE;
}

static PyMethodDef Decoder_methods[] = {
    {"open", (PyCFunction)Decoder_open, METH_O, "open(data) -> (width, height, components)"},
    {"view", (PyCFunction)(void (*)(void))Decoder_view, METH_VARARGS | METH_KEYWORDS,
     "view(out, crop, resized, window, *, bicubic=False, mirror=False, flip=False, least=0.0) -> denominator"},
    {"close", (PyCFunction)Decoder_close, METH_NOARGS, "close() -> None"},
    {NULL, NULL, 0, NULL}};

static PyType_Slot Decoder_slots[] = {{Py_tp_new, Decoder_new},
                                      {Py_tp_dealloc, Decoder_dealloc},
                                      {Py_tp_methods, Decoder_methods},
                                      {Py_tp_doc, "A JPEG decoder that keeps its buffers: one for each thread."},
                                      {0, NULL}};

static PyType_Spec Decoder_spec = {"tlx.data._jpeg.Decoder", sizeof(Decoder), 0, Py_TPFLAGS_DEFAULT, Decoder_slots};

/* ---- rewrite ---- */

struct transcoder {
    struct jpeg_decompress_struct in;
    struct jpeg_compress_struct out;
    struct failure failure;
    struct source source;
    struct jpeg_progress_mgr progress;
    struct jpeg_destination_mgr destination;
    int in_created, out_created;
    uint8_t *bytes;
    size_t size, room;
};

static void destination_full(struct transcoder *t, size_t used) {
    size_t room = t->room ? t->room * 2 : 1 << 16;
    uint8_t *bytes = PyMem_RawRealloc(t->bytes, room);
    if (!bytes) {
        t->failure.no_memory = 1;
        leave((j_common_ptr)&t->out, "no memory");
    }
    t->bytes = bytes;
    t->room = room;
    t->destination.next_output_byte = bytes + used;
    t->destination.free_in_buffer = room - used;
}

static void destination_init(j_compress_ptr c) { destination_full(c->client_data, 0); }

static boolean destination_empty(j_compress_ptr c) { /* libjpeg: the whole buffer is full, whatever free_in_buffer says */
    struct transcoder *t = c->client_data;
    destination_full(t, t->room);
    return TRUE;
}

static void destination_end(j_compress_ptr c) {
    struct transcoder *t = c->client_data;
    t->size = t->room - t->destination.free_in_buffer;
}

static int transcode(struct transcoder *t, const void *data, size_t size, int restarts) {
    j_decompress_ptr in = &t->in;
    j_compress_ptr out = &t->out;
    jvirt_barray_ptr *coefficients;
    jpeg_saved_marker_ptr m;
    int k;
    in->err = out->err = failure_init(&t->failure);
    if (setjmp(t->failure.back))
        return 0;
    t->failure.strict = 1;
    jpeg_create_decompress(in);
    t->in_created = 1;
    jpeg_create_compress(out);
    t->out_created = 1;
    t->progress.progress_monitor = on_progress;
    in->progress = &t->progress;
    out->client_data = t;
    source_set(in, &t->source, data, size);
    jpeg_save_markers(in, JPEG_COM, 0xFFFF);
    for (k = 0; k < 16; k++)
        jpeg_save_markers(in, JPEG_APP0 + k, 0xFFFF);
    jpeg_read_header(in, TRUE);
    check_kind(in);
    coefficients = jpeg_read_coefficients(in);
    jpeg_copy_critical_parameters(in, out);
    out->optimize_coding = TRUE;
    out->arith_code = FALSE;
    out->restart_interval = 0;
    out->restart_in_rows = restarts ? 1 : 0;
    t->destination.init_destination = destination_init;
    t->destination.empty_output_buffer = destination_empty;
    t->destination.term_destination = destination_end;
    out->dest = &t->destination;
    jpeg_write_coefficients(out, coefficients);
    for (m = in->marker_list; m; m = m->next) {
        /* libjpeg writes these two itself, from what it read */
        if (out->write_JFIF_header && m->marker == JPEG_APP0 && m->data_length >= 5 && !memcmp(m->data, "JFIF", 5))
            continue;
        if (out->write_Adobe_marker && m->marker == JPEG_APP0 + 14 && m->data_length >= 5 &&
            !memcmp(m->data, "Adobe", 5))
            continue;
        jpeg_write_marker(out, m->marker, m->data, m->data_length);
    }
    jpeg_finish_compress(out);
    jpeg_finish_decompress(in);
    return 1;
}

static PyObject *rewrite(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"data", "restarts", NULL};
    struct transcoder *t;
    Py_buffer data;
    PyObject *result;
    int restarts = 1, ok;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y*|$p:rewrite", names, &data, &restarts))
        return NULL;
    t = PyMem_RawCalloc(1, sizeof *t);
    if (!t) {
        PyBuffer_Release(&data);
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS
    ok = transcode(t, data.buf, (size_t)data.len, restarts);
    Py_END_ALLOW_THREADS
    result = ok ? PyBytes_FromStringAndSize((const char *)t->bytes, (Py_ssize_t)t->size) : raise_failure(&t->failure);
    if (t->out_created)
        jpeg_destroy_compress(&t->out);
    if (t->in_created)
        jpeg_destroy_decompress(&t->in);
    PyMem_RawFree(t->bytes);
    PyMem_RawFree(t);
    PyBuffer_Release(&data);
    return result;
}

static PyObject *about(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyUnicode_FromFormat("libjpeg-turbo %s, %s", QUOTE(LIBJPEG_TURBO_VERSION), avx2 ? "AVX2" : "plain C");
}

static PyMethodDef functions[] = {
    {"about", about, METH_NOARGS, "about() -> str"},
    {"rewrite", (PyCFunction)(void (*)(void))rewrite, METH_VARARGS | METH_KEYWORDS,
     "rewrite(data, *, restarts=True) -> bytes"},
    {NULL, NULL, 0, NULL}};

static int start(PyObject *module) {
    PyObject *type;
    int failed;
#if WITH_AVX2
    const char *plain = getenv("TLX_JPEG_PLAIN");
    __builtin_cpu_init();
    avx2 = __builtin_cpu_supports("avx2") && !(plain && plain[0] == '1');
#endif
    type = PyType_FromModuleAndSpec(module, &Decoder_spec, NULL);
    if (!type)
        return -1;
    failed = PyModule_AddObjectRef(module, "Decoder", type);
    Py_DECREF(type);
    return failed ? failed : PyModule_AddIntConstant(module, "INTERFACE", INTERFACE);
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, start}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "tlx.data._jpeg", "JPEG bytes to a small picture.", 0, functions, module_slots, NULL, NULL,
    NULL};

PyMODINIT_FUNC PyInit__jpeg(void) { return PyModuleDef_Init(&definition); }
