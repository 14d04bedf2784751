// A decoding step in FP32 on the CPU: the arithmetic of model/block.py for a few tokens, in one program.
//
// Layout. A *lane vector* holds one number of each of 16 tokens, and an activation of width D is D of them. Products
// with a weight matrix, norms, gates, rotations and Sinkhorn's rounds are then loops over whole vectors in which no
// token meets another: there is nothing to reduce across a vector, weights are read once and in the order in which they
// lie, and 16 tokens cost what one costs. More than 16 tokens are groups of 16; lanes behind the last token hold zeros.
// Only where each token looks at rows of its own, in the cache, or goes to experts of its own are tokens taken one by
// one: lanes are then numbers of one vector.
//
// Threads. Each exported function is one parallel region. `#pragma omp for` deals out the rows of a matrix, the groups
// or the tokens, and all threads wait at its end, so that what one phase writes the next may read.
//
// The widths are constants that library.py puts in front of this file; the letters are those of DESIGN.md. X is the
// columns of a compressor. Where a width has to be a multiple of something, `require_native` has seen to it.

#include <algorithm>
#include <cmath>
#include <cstdint>

constexpr int LANES = 16;
using Lanes = float __attribute__((vector_size(4 * LANES), may_alias));
using Ints = int32_t __attribute__((vector_size(4 * LANES), may_alias));

constexpr int COEFFICIENTS = (2 + S) * S, PAGE = 128, CSA = 4, HCA = 128;
constexpr int AHEAD = 8;  // rows of an expert that are asked for before their turn

// The tensors of one compressor. tails and rows belong to the state.
struct Compressor {
    const float *ape, *wkv, *wgate, *norm;
    float *values, *scores, *rows;
};

struct HyperConnection {
    const float *fn, *base, *scale, *norm;
};

struct Block {
    HyperConnection hc_attn;
    const float *wq_a, *q_norm, *wq_b, *wkv, *kv_norm, *wo_a, *wo_b, *sink;
    Compressor entries;
    const float *index_wq_b, *index_weights;
    Compressor index;
    HyperConnection hc_ffn;
    const float *gate, *bias;
    const int64_t *table;
    const float *w1, *w2, *w3, *shared_w1, *shared_w2, *shared_w3;
    float *window;
    int64_t ratio;
};

struct Ends {
    const float *embedding, *fn, *base, *scale, *norm, *head;
};

// tokens, positions, slots: one for each of `count`. pages: the table of all slots. frequencies: of window-only layers,
// and of the others. angles: cos and sin of all tokens for both, made by `begin`. streams: S D lane vectors a group.
struct Step {
    int64_t count, spare, pages_per_slot;
    const int64_t *tokens, *positions, *slots;
    const int32_t *pages;
    const float *frequencies[2];
    Lanes *angles, *streams;
    float *logits;
    int64_t groups() const { return (count + LANES - 1) / LANES; }
};

// -- arithmetic of lane vectors ------------------------------------------------------------------------------------

inline Lanes splat(float value) { return value - Lanes{}; }

// Of two numbers the second comes through when it is not a number.
inline Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }
inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

inline Lanes root(Lanes x) {
    for (int lane = 0; lane < LANES; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
}

// e^x = 2^n e^r with |r| <= ln(2) / 2, and a polynomial for e^r.
inline Lanes exponential(Lanes x) {
    x = smaller(splat(88.0f), larger(splat(-87.0f), x));
    const float rounder = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
    const Lanes n = (x * 1.44269504f + rounder) - rounder;
    const Lanes r = x - n * 0.693145752f - n * 1.42860677e-6f;
    Lanes y = splat(1.0f / 5040);
    for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f}) y = y * r + factor;
    return y * (Lanes)((__builtin_convertvector(n, Ints) + 127) << 23);
}

inline Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + exponential(-x)); }

inline float sum(Lanes x) {
    float total = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Lane i is the sum of x[i]: neighbours are added in all vectors at once, two vectors become one, until one is left.
inline Lanes sums(Lanes (&x)[LANES]) {
    for (int count = LANES / 2; count; count /= 2)
        for (int i = 0; i < count; ++i) {
            const Lanes a = x[2 * i], b = x[2 * i + 1];
            x[i] = SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
                   SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        }
    return x[0];
}

inline Lanes load(const float *numbers) {
    using Anywhere = float __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
    return *(const Anywhere *)numbers;
}

inline float largest(Lanes x) {
    float found = x[0];
    for (int lane = 1; lane < LANES; ++lane) found = std::max(found, x[lane]);
    return found;
}

// 1 / sqrt(mean of the squares + eps) of one token's n numbers.
inline float inverse_rms(const float *x, int n) {
    Lanes squares = {};
    for (int at = 0; at < n; at += LANES) squares += load(x + at) * load(x + at);
    return 1.0f / std::sqrt(sum(squares) / n + RMS_EPS);
}

// sums[r] += sum_at w[r, at] x[at] for a few rows of a matrix, enough of them to keep the multipliers busy. The rows
// behind them are asked for meanwhile, line by line as they lie.
template <int ROWS>
inline void add_rows(const float *w, const Lanes *x, int64_t n, Lanes *sums) {
    Lanes sum[ROWS];
    for (int r = 0; r < ROWS; ++r) sum[r] = sums[r];
    for (int64_t at = 0; at < n; ++at) {
        if (at % LANES == 0)
            for (int r = 0; r < ROWS; ++r) __builtin_prefetch(w + ROWS * n + at * ROWS + r * LANES);
        for (int r = 0; r < ROWS; ++r) sum[r] += w[r * n + at] * x[at];
    }
    for (int r = 0; r < ROWS; ++r) sums[r] = sum[r];
}

// Memory that is not filled first.
template <class Number = Lanes>
struct Buffer {
    Number *const numbers;
    explicit Buffer(int64_t count) : numbers(new Number[count]) {}
    Buffer(const Buffer &) = delete;
    ~Buffer() { delete[] numbers; }
    operator Number *() const { return numbers; }
};

// y[group, o] = sum_n w[o, n] x[group, n], the rows of w dealt out to the threads, which do not wait at the end.
template <int ROWS = 8>
void product(const float *w, int64_t outputs, int64_t n, const Lanes *x, int64_t x_width, Lanes *y, int64_t y_width,
             int64_t groups) {
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < (outputs + ROWS - 1) / ROWS; ++block)
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t first = block * ROWS;
            const float *rows = w + first * n;
            const Lanes *source = x + group * x_width;
            Lanes *target = y + group * y_width + first;
            if (first + ROWS <= outputs) {
                Lanes sums[ROWS] = {};
                add_rows<ROWS>(rows, source, n, sums);
                std::copy(sums, sums + ROWS, target);
            } else {
                for (int64_t row = 0; first + row < outputs; ++row) {
                    target[row] = Lanes{};
                    add_rows<1>(rows + row * n, source, n, target + row);
                }
            }
        }
}

inline Lanes inverse_rms(const Lanes *x, int64_t n) {
    Lanes squares[4] = {};
    for (int64_t at = 0; at < n; ++at) squares[at % 4] += x[at] * x[at];
    return 1.0f / root((squares[0] + squares[1] + squares[2] + squares[3]) / (float)n + RMS_EPS);
}

inline void normalise(Lanes *x, int64_t n, const float *weight) {
    const Lanes scale = inverse_rms(x, n);
    for (int64_t at = 0; at < n; ++at) x[at] = x[at] * scale * weight[at];
}

// The last R numbers of x turn by cos and sin [R / 2]; of lane vectors, or of one token.
template <class Number>
inline void rotate(Number *x, int width, const Number *cos, const Number *sin, float sign = 1.0f) {
    for (int pair = 0; pair < R / 2; ++pair) {
        Number &real = x[width - R + 2 * pair], &imaginary = x[width - R + 2 * pair + 1];
        const Number turned = real * cos[pair] - imaginary * sin[pair] * sign;
        imaginary = real * sin[pair] * sign + imaginary * cos[pair];
        real = turned;
    }
}

// -- hyper-connections (report 2.2) --------------------------------------------------------------------------------

struct Mixing {
    Lanes post[S], comb[S][S];
};

inline void sinkhorn(Lanes (&comb)[S][S]) {
    for (int j = 0; j < S; ++j) {  // softmax of each row
        Lanes most = comb[j][0], total = {};
        for (int k = 1; k < S; ++k) most = larger(most, comb[j][k]);
        for (int k = 0; k < S; ++k) total += comb[j][k] = exponential(comb[j][k] - most);
        for (int k = 0; k < S; ++k) comb[j][k] = comb[j][k] / total + HC_EPS;
    }
    for (int round = 0; round < 2 * ROUNDS - 1; ++round)  // columns, then rows and columns in turn
        for (int a = 0; a < S; ++a) {
            Lanes total = splat(HC_EPS);
            for (int b = 0; b < S; ++b) total += round % 2 ? comb[a][b] : comb[b][a];
            const Lanes scale = 1.0f / total;
            for (int b = 0; b < S; ++b) (round % 2 ? comb[a][b] : comb[b][a]) *= scale;
        }
}

// y = norm(sum_j pre_j X_j), and how the sublayer's output joins the streams again.
void mix_in(const HyperConnection &hc, const Step &step, Lanes *mixes, Lanes *y, Mixing *mixing) {
    product<12>(hc.fn, COEFFICIENTS, S * D, step.streams, S * D, mixes, COEFFICIENTS, step.groups());
#pragma omp barrier
#pragma omp for
    for (int64_t group = 0; group < step.groups(); ++group) {
        const Lanes *x = step.streams + group * S * D;
        const Lanes scale = inverse_rms(x, S * D);
        Lanes pre[S];
        const auto logit = [&](int row, int gate) {
            return mixes[group * COEFFICIENTS + row] * scale * hc.scale[gate] + hc.base[row];
        };
        for (int j = 0; j < S; ++j) {
            pre[j] = sigmoid(logit(j, 0)) + HC_EPS;
            mixing[group].post[j] = 2.0f * sigmoid(logit(S + j, 1));
            for (int k = 0; k < S; ++k) mixing[group].comb[j][k] = logit(2 * S + S * j + k, 2);
        }
        sinkhorn(mixing[group].comb);
        for (int d = 0; d < D; ++d) {
            Lanes total = {};
            for (int j = 0; j < S; ++j) total += pre[j] * x[j * D + d];
            y[group * D + d] = total;
        }
        normalise(y + group * D, D, hc.norm);
    }
}

// X'_k = post_k y + sum_j comb_jk X_j.
void mix_out(const Step &step, const Lanes *y, const Mixing *mixing) {
#pragma omp for collapse(2)
    for (int64_t group = 0; group < step.groups(); ++group)
        for (int d = 0; d < D; ++d) {
            const Mixing &mix = mixing[group];
            Lanes *x = step.streams + group * S * D + d, mixed[S];
            for (int k = 0; k < S; ++k) {
                mixed[k] = mix.post[k] * y[group * D + d];
                for (int j = 0; j < S; ++j) mixed[k] += mix.comb[j][k] * x[j * D];
            }
            for (int k = 0; k < S; ++k) x[k * D] = mixed[k];
        }
}

// -- what the tokens bring to the cache ----------------------------------------------------------------------------

// Tokens are pulled out of and put into lane vectors: `vector[at]` of the token is number `at` of its lane.
inline void pull(const Lanes *vectors, int64_t token, int64_t n, int64_t width, float *target) {
    const float *lane = (const float *)(vectors + token / LANES * width) + token % LANES;
    for (int64_t at = 0; at < n; ++at) target[at] = lane[at * LANES];
}

inline void push(const float *source, int64_t n, Lanes *vectors, int64_t token, int64_t width) {
    float *lane = (float *)(vectors + token / LANES * width) + token % LANES;
    for (int64_t at = 0; at < n; ++at) lane[at * LANES] = source[at];
}

inline int64_t ring_row(const Step &step, int64_t token, int64_t position, int length) {
    const int64_t ring = length + step.spare;
    return step.slots[token] * ring + position % ring;
}

inline int64_t entry_row(const Step &step, int64_t token, int64_t entry, int ratio) {
    const int per_page = PAGE / ratio;
    const int64_t page = step.pages[step.slots[token] * step.pages_per_slot + entry / per_page];
    return page * per_page + entry % per_page;
}

// Values and scores of the new tokens go into the tails.
template <int RATIO, int WIDTH>
void keep_tails(const Compressor &compressor, const Step &step, const Lanes *values, const Lanes *scores) {
    constexpr int X = RATIO == CSA ? 2 * WIDTH : WIDTH, ring = RATIO == CSA ? 2 * CSA : RATIO;
#pragma omp for nowait
    for (int64_t token = 0; token < step.count; ++token) {
        const int64_t position = step.positions[token], row = ring_row(step, token, position, ring);
        float *target = compressor.scores + row * X;
        pull(values, token, X, X, compressor.values + row * X);
        pull(scores, token, X, X, target);
        for (int at = 0; at < X; ++at) target[at] += compressor.ape[position % RATIO * X + at];
    }
}

// Every token that finishes an entry pools, normalises, rotates and stores it (report 2.3.1, 2.3.2).
template <int RATIO, int WIDTH>
void finish_entries(const Compressor &compressor, const Step &step) {
    constexpr int X = RATIO == CSA ? 2 * WIDTH : WIDTH, ring = RATIO == CSA ? 2 * CSA : RATIO;
#pragma omp for nowait
    for (int64_t token = 0; token < step.count; ++token) {
        const int64_t position = step.positions[token];
        if ((position + 1) % RATIO) continue;
        float pooled[WIDTH];
        for (int at = 0; at < WIDTH; at += LANES) {
            Lanes most = splat(-INFINITY), weights = {}, values = {};
            for (const bool adding : {false, true})  // the largest score of each channel first, then the sums
                for (int slot = 0; slot < ring; ++slot) {
                    const int64_t place = position - ring + 1 + slot;
                    if (place < 0) continue;
                    const int column = RATIO == CSA && slot >= CSA ? WIDTH : 0;
                    const int64_t number = ring_row(step, token, place, ring) * X + column + at;
                    const Lanes score = load(compressor.scores + number);
                    if (!adding) {
                        most = larger(most, score);
                        continue;
                    }
                    const Lanes weight = exponential(score - most);
                    weights += weight;
                    values += weight * load(compressor.values + number);
                }
            values /= weights;
            std::copy_n((const float *)&values, LANES, pooled + at);
        }
        const float scale = inverse_rms(pooled, WIDTH);
        for (int at = 0; at < WIDTH; ++at) pooled[at] *= scale * compressor.norm[at];
        float cos[R / 2], sin[R / 2];
        for (int pair = 0; pair < R / 2; ++pair) {
            const float angle = (float)(position / RATIO * RATIO) * step.frequencies[1][pair];
            cos[pair] = std::cos(angle), sin[pair] = std::sin(angle);
        }
        rotate(pooled, WIDTH, cos, sin);
        std::copy(pooled, pooled + WIDTH, compressor.rows + entry_row(step, token, position / RATIO, RATIO) * WIDTH);
    }
}

// -- attention of one token over rows of the cache -----------------------------------------------------------------

// q . row for 16 rows of a cache.
template <int WIDTH>
inline Lanes dots(const float *q, const float *const *rows) {
    Lanes products[LANES];
    for (int row = 0; row < LANES; ++row) {
        products[row] = load(q) * load(rows[row]);
        for (int at = LANES; at < WIDTH; at += LANES) products[row] += load(q + at) * load(rows[row] + at);
    }
    return sums(products);
}

// o_h = sum_x p_hx row_x with p_hx = exp(s_hx) / (sum exp(s_h) + exp(sink_h)), s_hx = q_h . row_x / sqrt(K). rows: a
// multiple of 16, of which the first `count` count.
void attend(const float *q, const float *const *rows, int64_t count, const float *sink, Lanes *scores, float *o) {
    constexpr int COLUMNS = K % (4 * LANES) ? 1 : 4;  // lane vectors of o at a time
    const int64_t blocks = (count + LANES - 1) / LANES;
    for (int64_t at = 0; at < blocks; ++at)
        for (int h = 0; h < H; ++h) scores[h * blocks + at] = dots<K>(q + h * K, rows + at * LANES);
    for (int h = 0; h < H; ++h) {
        Lanes *p = scores + h * blocks, most = splat(sink[h]), total = {};
        for (int64_t x = count; x < blocks * LANES; ++x) ((float *)p)[x] = -INFINITY;
        for (int64_t at = 0; at < blocks; ++at) most = larger(most, p[at]);
        const float peak = largest(most);
        for (int64_t at = 0; at < blocks; ++at) total += p[at] = exponential(p[at] - peak);
        const float scale = 1.0f / (sum(total) + std::exp(sink[h] - peak));
        for (int64_t at = 0; at < blocks; ++at) p[at] *= scale;
    }
    for (int h = 0; h < H; h += 4)
        for (int v = 0; v < K; v += COLUMNS * LANES) {
            Lanes total[4][COLUMNS] = {};
            for (int64_t x = 0; x < count; ++x)
                for (int c = 0; c < COLUMNS; ++c) {
                    const Lanes row = load(rows[x] + v + c * LANES);
                    for (int i = 0; i < 4; ++i) total[i][c] += ((const float *)(scores + (h + i) * blocks))[x] * row;
                }
            for (int i = 0; i < 4; ++i) std::copy_n((const float *)total[i], COLUMNS * LANES, o + (h + i) * K + v);
        }
}

// The entries of the M largest score = sum_j w_j ReLU(q_j . key), in ascending order, equal ones the lower first; false
// when a score is not a number (report 2.3.1). keys: as the rows of `attend`. chosen: room for `visible` numbers; the
// picks are its first.
bool pick(const float *q, const float *w, const float *const *keys, int64_t visible, Lanes *scores, int32_t *chosen) {
    for (int64_t entry = 0; entry < visible; ++entry) chosen[entry] = entry;
    if (visible <= M) return true;
    bool ordered = true;
    for (int64_t at = 0; at * LANES < visible; ++at) {
        scores[at] = Lanes{};
        for (int j = 0; j < J; ++j) scores[at] += w[j] * larger(Lanes{}, dots<I>(q + j * I, keys + at * LANES));
    }
    const float *score = (const float *)scores;
    for (int64_t entry = 0; entry < visible; ++entry) ordered &= score[entry] == score[entry];
    if (!ordered) return false;
    std::nth_element(chosen, chosen + M, chosen + visible, [&](int32_t a, int32_t b) {
        return score[a] > score[b] || (score[a] == score[b] && a < b);
    });
    std::sort(chosen, chosen + M);
    return true;
}

// -- the sublayers -------------------------------------------------------------------------------------------------

// What the threads of a region share between the phases of attention.
struct AttentionWork {
    Buffer<> latent, key, q, values, scores, index_values, index_scores, index_q, index_w, o, low;
    explicit AttentionWork(int64_t groups)
        : latent(groups * Q), key(groups * K), q(groups * H * K), values(groups * 2 * K), scores(groups * 2 * K),
          index_values(groups * 2 * I), index_scores(groups * 2 * I), index_q(groups * J * I), index_w(groups * J),
          o(groups * H * K), low(groups * O * L) {
        // No token writes into the lanes of the last group that have none. Numbers too small for a float's full
        // precision, which is what lies around, take some processors a hundred times as long.
        std::fill_n((Lanes *)o + (groups - 1) * H * K, H * K, Lanes{});
    }
};

inline const Lanes *cosines(const Step &step, int kind, int64_t group) {
    return step.angles + (kind * step.groups() + group) * R;
}

// One token: its queries, the rows that it sees, its picks, and what attention gives, turned back at its position.
template <int RATIO>
bool attend_token(const Block &block, const Step &step, const AttentionWork &work, int64_t token) {
    const int64_t position = step.positions[token], visible = RATIO ? (position + 1) / std::max(RATIO, 1) : 0;
    float cos[R / 2], sin[R / 2];
    const Lanes *angles = cosines(step, RATIO > 0, token / LANES);
    for (int pair = 0; pair < R / 2; ++pair) {
        cos[pair] = angles[pair][token % LANES];
        sin[pair] = angles[R / 2 + pair][token % LANES];
    }
    alignas(64) float q[H * K], o[H * K];
    pull(work.q, token, H * K, H * K, q);
    for (int h = 0; h < H; ++h) {
        const float scale = inverse_rms(q + h * K, K);
        for (int k = 0; k < K; ++k) q[h * K + k] *= scale;
        rotate(q + h * K, K, cos, sin);
        for (int k = 0; k < K; ++k) q[h * K + k] *= 1.0f / std::sqrt((float)K);
    }
    const int64_t first = std::max<int64_t>(0, position - W + 1), window = position - first + 1;
    const int64_t most = window + (RATIO == CSA ? std::min<int64_t>(visible, M) : visible);
    const int64_t blocks = (most + LANES - 1) / LANES, key_blocks = RATIO == CSA ? (visible + LANES - 1) / LANES : 0;
    const Buffer<const float *> rows(blocks * LANES), keys(key_blocks * LANES);
    const Buffer<> scores(std::max<int64_t>(H * blocks, key_blocks));
    std::fill_n((const float **)rows, blocks * LANES, block.window);  // what stands in for rows that do not count
    std::fill_n((const float **)keys, key_blocks * LANES, block.index.rows);
    const int64_t ring = W + step.spare, ring_start = step.slots[token] * ring;
    for (int64_t at = 0, row = first % ring; at < window; ++at, row = row + 1 == ring ? 0 : row + 1)
        rows[at] = block.window + (ring_start + row) * K;
    bool ordered = true;
    if constexpr (RATIO == CSA) {
        alignas(64) float index_q[J * I];
        float w[J];
        pull(work.index_q, token, J * I, J * I, index_q);
        pull(work.index_w, token, J, J, w);
        for (int j = 0; j < J; ++j) rotate(index_q + j * I, I, cos, sin);
        for (int j = 0; j < J; ++j) w[j] *= 1.0f / std::sqrt((float)I * J);
        const Buffer<int32_t> chosen(visible);
        for (int64_t entry = 0; entry < visible; ++entry)
            keys[entry] = block.index.rows + entry_row(step, token, entry, CSA) * I;
        ordered = pick(index_q, w, keys, visible, scores, chosen);
        for (int64_t at = 0; at < most - window; ++at)
            rows[window + at] = block.entries.rows + entry_row(step, token, chosen[at], CSA) * K;
    } else {
        for (int64_t entry = 0; entry < visible; ++entry)
            rows[window + entry] = block.entries.rows + entry_row(step, token, entry, HCA) * K;
    }
    attend(q, rows, most, block.sink, scores, o);
    for (int h = 0; h < H; ++h) rotate(o + h * K, K, cos, sin, -1.0f);
    push(o, H * K, work.o, token, H * K);
    return ordered;
}

// y becomes the attention of y (report 2.3); false when an index score is not a number.
template <int RATIO>
void attention(const Block &block, const Step &step, AttentionWork &work, Lanes *y, bool &ordered) {
    const int64_t groups = step.groups();
    constexpr int X = RATIO == CSA ? 2 * K : K;
    product(block.wq_a, Q, D, y, D, work.latent, Q, groups);
    product(block.wkv, K, D, y, D, work.key, K, groups);
    if constexpr (RATIO > 0) {
        product(block.entries.wkv, X, D, y, D, work.values, X, groups);
        product(block.entries.wgate, X, D, y, D, work.scores, X, groups);
    }
    if constexpr (RATIO == CSA) {
        product(block.index.wkv, 2 * I, D, y, D, work.index_values, 2 * I, groups);
        product(block.index.wgate, 2 * I, D, y, D, work.index_scores, 2 * I, groups);
        product(block.index_weights, J, D, y, D, work.index_w, J, groups);
    }
#pragma omp barrier
#pragma omp for
    for (int64_t task = 0; task < 2 * groups; ++task) {
        const int64_t group = task / 2;
        if (task % 2) {
            normalise(work.latent + group * Q, Q, block.q_norm);
            continue;
        }
        Lanes *key = work.key + group * K;
        const Lanes *angles = cosines(step, RATIO > 0, group);
        normalise(key, K, block.kv_norm);
        rotate(key, K, angles, angles + R / 2);
        for (int64_t token = group * LANES; token < std::min(step.count, (group + 1) * LANES); ++token)
            pull(work.key, token, K, K, block.window + ring_row(step, token, step.positions[token], W) * K);
    }
    if constexpr (RATIO > 0) keep_tails<RATIO, K>(block.entries, step, work.values, work.scores);
    if constexpr (RATIO == CSA) {
        keep_tails<RATIO, I>(block.index, step, work.index_values, work.index_scores);
        product(block.index_wq_b, J * I, Q, work.latent, Q, work.index_q, J * I, groups);
    }
    product(block.wq_b, H * K, Q, work.latent, Q, work.q, H * K, groups);
#pragma omp barrier
    if constexpr (RATIO > 0) finish_entries<RATIO, K>(block.entries, step);
    if constexpr (RATIO == CSA) finish_entries<RATIO, I>(block.index, step);
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (int64_t token = 0; token < step.count; ++token)
        if (!attend_token<RATIO>(block, step, work, token)) {
#pragma omp atomic write
            ordered = false;
        }
    for (int o = 0; o < O; ++o)
        product(block.wo_a + (int64_t)o * L * (H * K / O), L, H * K / O, work.o + o * (H * K / O), H * K,
                work.low + o * L, O * L, groups);
#pragma omp barrier
    product(block.wo_b, D, O * L, work.low, O * L, y, D, groups);
#pragma omp barrier
}

// x: the tokens' vectors, one behind the other. hidden: of the shared expert as lane vectors, and of every pair of a
// token and an expert that it visits. Pairs are sorted by expert: those of e are starts[e] to starts[e + 1] - 1.
// weights: of every pair, four times, as `tile` has its lanes.
struct ExpertWork {
    Buffer<> logits, hidden;
    Buffer<float> x, pair_hidden, weights;
    Buffer<int64_t> tokens;
    Buffer<int> choices;
    int64_t starts[E + 1];
    explicit ExpertWork(int64_t groups)
        : logits(groups * E), hidden(groups * F), x(groups * LANES * D), pair_hidden(groups * LANES * A * F),
          weights(4 * groups * LANES * A + LANES), tokens(groups * LANES * A), choices(groups * LANES * A) {}
};

// The A experts of a token (report 2.1) and their weights.
inline void choose(const Block &block, const Step &step, const Lanes *logits, int64_t token, int *choices,
                   float *weights) {
    float numbers[E], scores[E], total = 0.0f;
    int experts[E];
    pull(logits, token, E, E, numbers);
    for (int e = 0; e < E; ++e) {
        const float softplus = numbers[e] > 20.0f ? numbers[e] : std::log1p(std::exp(numbers[e]));
        scores[e] = std::sqrt(std::max(softplus, 1e-36f));
        experts[e] = e;
    }
    if (block.table)
        std::copy_n(block.table + step.tokens[token] * A, A, experts);
    else
        std::partial_sort(experts, experts + A, experts + E, [&](int a, int b) {
            const float first = scores[a] + block.bias[a], second = scores[b] + block.bias[b];
            return first > second || (first == second && a < b);
        });
    for (int a = 0; a < A; ++a) total += scores[experts[a]];
    for (int a = 0; a < A; ++a) {
        choices[a] = experts[a];
        weights[a] = scores[experts[a]] / (total + 1e-20f) * ROUTE_SCALE;
    }
}

// Pairs of tokens and experts, sorted by expert.
void sort_pairs(const Block &block, const Step &step, ExpertWork &work) {
    const Buffer<float> weights(step.count * A);
    std::fill(work.starts, work.starts + E + 1, 0);
    for (int64_t token = 0; token < step.count; ++token) {
        choose(block, step, work.logits, token, work.choices + token * A, weights + token * A);
        for (int a = 0; a < A; ++a) ++work.starts[work.choices[token * A + a] + 1];
    }
    int64_t next[E];
    for (int e = 0; e < E; ++e) next[e] = work.starts[e + 1] += work.starts[e];
    for (int64_t pair = step.count * A - 1; pair >= 0; --pair) {
        const int64_t place = --next[work.choices[pair]];
        work.tokens[place] = pair / A;
        std::fill_n(work.weights + 4 * place, 4, weights[pair]);
    }
}

// Four rows of a matrix times V vectors of n numbers, at most four: lane 4 v + r is w_r . x_v.
template <int V>
inline Lanes tile(const float *w, const float *const *x, int64_t n) {
    Lanes products[LANES] = {};
    for (int64_t at = 0; at < n; at += LANES)
        for (int r = 0; r < 4; ++r) {
            __builtin_prefetch(w + AHEAD * n + at * 4 + r * LANES);
            for (int v = 0; v < V; ++v) products[4 * v + r] += load(w + r * n + at) * load(x[v] + at);
        }
    return sums(products);
}

inline Lanes tile(const float *w, const float *const *x, int64_t n, int64_t count) {
    switch (count) {
        case 1: return tile<1>(w, x, n);
        case 2: return tile<2>(w, x, n);
        case 3: return tile<3>(w, x, n);
        default: return tile<4>(w, x, n);
    }
}

inline Lanes gated(Lanes gate, Lanes up, Lanes weight) {
    gate = smaller(splat(LIMIT), gate);
    return gate * sigmoid(gate) * larger(splat(-LIMIT), smaller(splat(LIMIT), up)) * weight;
}

// h = silu(min(W1 y, limit)) clamp(W3 y) weight, for 16 rows of one expert and its pairs.
void hidden_rows(const Block &block, ExpertWork &work, int e, int64_t first) {
    const int64_t at = ((int64_t)e * F + first) * D;
    for (int64_t pair = work.starts[e]; pair < work.starts[e + 1]; pair += 4) {
        const int64_t count = std::min<int64_t>(4, work.starts[e + 1] - pair);
        const float *x[4];
        for (int v = 0; v < count; ++v) x[v] = work.x + work.tokens[pair + v] * D;
        Lanes gate[4], up[4];
        for (int four = 0; four < 4; ++four) {
            gate[four] = tile(block.w1 + at + four * 4 * D, x, D, count);
            up[four] = tile(block.w3 + at + four * 4 * D, x, D, count);
        }
        for (int four = 0; four < 4; ++four) {
            const Lanes hidden = gated(gate[four], up[four], load(work.weights + 4 * pair));
            for (int v = 0; v < count; ++v)
                std::copy_n((const float *)&hidden + 4 * v, 4, work.pair_hidden + (pair + v) * F + first + 4 * four);
        }
    }
}

// y += W2 h, for four rows of one expert and its pairs.
void add_expert(const Block &block, const ExpertWork &work, int e, int64_t first, Lanes *y) {
    for (int64_t pair = work.starts[e]; pair < work.starts[e + 1]; pair += 4) {
        const int64_t count = std::min<int64_t>(4, work.starts[e + 1] - pair);
        const float *x[4];
        for (int v = 0; v < count; ++v) x[v] = work.pair_hidden + (pair + v) * F;
        const Lanes found = tile(block.w2 + ((int64_t)e * D + first) * F, x, F, count);
        for (int v = 0; v < count; ++v) {
            const int64_t token = work.tokens[pair + v];
            float *lane = (float *)(y + token / LANES * D + first) + token % LANES;
            for (int r = 0; r < 4; ++r) lane[r * LANES] += ((const float *)&found)[4 * v + r];
        }
    }
}

// Eight rows of the shared expert and 16 tokens.
inline void shared_rows(const Block &block, const Lanes *y, int64_t first, Lanes *hidden) {
    Lanes gate[8] = {}, up[8] = {};
    add_rows<8>(block.shared_w1 + first * D, y, D, gate);
    add_rows<8>(block.shared_w3 + first * D, y, D, up);
    for (int r = 0; r < 8; ++r) hidden[first + r] = gated(gate[r], up[r], splat(1.0f));
}

// y becomes what the experts make of y. The shared expert, which all tokens visit, multiplies lane vectors; the others
// have few tokens each, so that lanes are numbers of one token there.
void experts(const Block &block, const Step &step, ExpertWork &work, Lanes *y) {
    const int64_t groups = step.groups();
    product(block.gate, E, D, y, D, work.logits, E, groups);
#pragma omp for nowait
    for (int64_t token = 0; token < step.count; ++token) pull(y, token, D, D, work.x + token * D);
#pragma omp barrier
#pragma omp single nowait
    sort_pairs(block, step, work);
#pragma omp for schedule(dynamic, 2)
    for (int64_t first = 0; first < F; first += 8)
        for (int64_t group = 0; group < groups; ++group)
            shared_rows(block, y + group * D, first, work.hidden + group * F);
#pragma omp for schedule(dynamic, 2)
    for (int64_t run = 0; run < E * F / 16; ++run) hidden_rows(block, work, run / (F / 16), run % (F / 16) * 16);
#pragma omp for schedule(dynamic, 2)
    for (int64_t first = 0; first < D; first += 8) {
        for (int64_t group = 0; group < groups; ++group) {
            Lanes *target = y + group * D + first;
            std::fill_n(target, 8, Lanes{});
            add_rows<8>(block.shared_w2 + first * F, work.hidden + group * F, F, target);
        }
        for (int e = 0; e < E; ++e)
            for (int64_t four = first; four < first + 8; four += 4) add_expert(block, work, e, four, y);
    }
}

// -- exported ------------------------------------------------------------------------------------------------------

// Angles of all tokens, and the streams as copies of their embeddings.
extern "C" void begin(const Step *step, const Ends *ends) {
#pragma omp parallel for
    for (int64_t token = 0; token < step->groups() * LANES; ++token) {
        const bool exists = token < step->count;
        const float position = exists ? step->positions[token] : 0;
        float angles[R], embedding[D] = {};
        for (int kind = 0; kind < 2; ++kind) {
            for (int pair = 0; pair < R / 2; ++pair) {
                angles[pair] = std::cos(position * step->frequencies[kind][pair]);
                angles[R / 2 + pair] = std::sin(position * step->frequencies[kind][pair]);
            }
            push(angles, R, step->angles + kind * step->groups() * R, token, R);
        }
        if (exists) std::copy_n(ends->embedding + step->tokens[token] * D, D, embedding);
        for (int s = 0; s < S; ++s) push(embedding, D, step->streams + s * D, token, S * D);
    }
}

// The streams through one block; 1 when an index score was not a number.
extern "C" int through_block(const Step *step, const Block *block) {
    const int64_t groups = step->groups();
    const Buffer<> mixes(groups * COEFFICIENTS), y(groups * D);
    const Buffer<Mixing> mixing(groups);
    AttentionWork work(groups);
    ExpertWork expert_work(groups);
    bool ordered = true;
#pragma omp parallel
    {
        mix_in(block->hc_attn, *step, mixes, y, mixing);
        if (block->ratio == 0) attention<0>(*block, *step, work, y, ordered);
        if (block->ratio == CSA) attention<CSA>(*block, *step, work, y, ordered);
        if (block->ratio == HCA) attention<HCA>(*block, *step, work, y, ordered);
        mix_out(*step, y, mixing);
        mix_in(block->hc_ffn, *step, mixes, y, mixing);
        experts(*block, *step, expert_work, y);
        mix_out(*step, y, mixing);
    }
    return !ordered;
}

// Logits [count, V] of the streams.
extern "C" void end(const Step *step, const Ends *ends) {
    const int64_t groups = step->groups();
    const Buffer<> mixes(groups * S), y(groups * D), logits(groups * V);
#pragma omp parallel
    {
        product<4>(ends->fn, S, S * D, step->streams, S * D, mixes, S, groups);
#pragma omp barrier
#pragma omp for
        for (int64_t group = 0; group < groups; ++group) {
            const Lanes *x = step->streams + group * S * D;
            const Lanes scale = inverse_rms(x, S * D);
            Lanes pre[S], *target = y + group * D;
            for (int j = 0; j < S; ++j)
                pre[j] = sigmoid(mixes[group * S + j] * scale * ends->scale[0] + ends->base[j]) + HC_EPS;
            for (int d = 0; d < D; ++d) {
                target[d] = Lanes{};
                for (int j = 0; j < S; ++j) target[d] += pre[j] * x[j * D + d];
            }
            normalise(target, D, ends->norm);
        }
        product(ends->head, V, D, y, D, logits, V, groups);
#pragma omp barrier
#pragma omp for
        for (int64_t token = 0; token < step->count; ++token) pull(logits, token, V, V, step->logits + token * V);
    }
}
