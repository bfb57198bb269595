// Attention of grid tokens on a CPU, with a plain C interface. See tile.h for the arithmetic.
#include "call.h"

struct List {
    std::vector<int32_t> token;
    std::vector<uint32_t> lanes;
    void clear() { token.clear(), lanes.clear(); }
    void add(int64_t number, uint32_t seen) { token.push_back((int32_t)number), lanes.push_back(seen); }
    void fill() {
        while (token.size() % EIGHT) add(token.back(), 0);
    }
    Keys view() const { return {(int64_t)token.size(), token.data(), lanes.data()}; }
};

// Every lane sees the extra tokens that are visible; they stand behind those of the grid.
static void list_extra(const Call& call, int64_t batch, List& list) {
    list.clear();
    for (int t = 0; t < call.extra; t++)
        if (!call.visible || call.visible[batch * call.extra + t]) list.add(call.tokens() + t, ~0u);
    list.fill();
}

// The keys of the tiles of one kind, relative to the first of them.
static void list_box(const Call& call, const Boxes& boxes, const int32_t* kind, List& list) {
    const Side *a = boxes.side, *b = a + 1, *c = a + 2;
    list.clear();
    for (int x = a->start[kind[0]]; x < a->start[kind[0] + 1]; x++)
        for (int y = b->start[kind[1]]; y < b->start[kind[1] + 1]; y++) {
            const int64_t line = ((int64_t)a->key[x] * call.grid[1] + b->key[y]) * call.grid[2];
            const uint32_t seen = a->seen[x] & b->seen[y];
            for (int z = c->start[kind[2]]; z < c->start[kind[2] + 1]; z++)
                if (seen & c->seen[z]) list.add(line + c->key[z], seen & c->seen[z]);
        }
    list.fill();
}

// One tile of boxes: whose turn it is.
struct Place {
    int64_t batch, kv_head, part, at[3];
    int32_t kind[3];
};

static Place place(const Call& call, const Boxes& boxes, int64_t parts, int64_t job) {
    Place p;
    for (int a = 2; a >= 0; a--) {
        p.at[a] = job % boxes.side[a].tiles, job /= boxes.side[a].tiles;
        p.kind[a] = boxes.side[a].kind[p.at[a]];
    }
    p.part = job % parts, job /= parts;
    p.kv_head = job % call.kv_heads, p.batch = job / call.kv_heads;
    return p;
}

// Where the queries of a tile are, null and -1 where a lane has none.
template <int NV>
struct Lanes {
    const float* q[LANES * NV];
    int64_t row[LANES * NV];  // in [batch, tokens, heads]

    void find(const Call& call, const Boxes& boxes, const Place& p) {
        const Side* side = boxes.side;
        int lane = 0;
        for (int64_t g = p.part * boxes.group; g < (p.part + 1) * boxes.group; g++)
            for (int x = 0; x < side[0].lanes; x++)
                for (int y = 0; y < side[1].lanes; y++)
                    for (int z = 0; z < side[2].lanes; z++, lane++) {
                        const int64_t i = side[0].query[p.at[0] * side[0].lanes + x];
                        const int64_t j = side[1].query[p.at[1] * side[1].lanes + y];
                        const int64_t k = side[2].query[p.at[2] * side[2].lanes + z];
                        if (g < call.group && i >= 0 && j >= 0 && k >= 0)
                            set(call, lane, p.batch, p.kv_head * call.group + g, i, j, k);
                        else
                            q[lane] = nullptr, row[lane] = -1;
                    }
        for (; lane < LANES * NV; lane++) q[lane] = nullptr, row[lane] = -1;
    }

    void set(const Call& call, int lane, int64_t batch, int64_t head, int64_t i, int64_t j, int64_t k) {
        const int64_t token = (i * call.grid[1] + j) * call.grid[2] + k;
        q[lane] = call.q + batch * call.q_batch + head * call.q_head + i * call.q_axis[0] + j * call.q_axis[1] +
                  k * call.q_axis[2];
        row[lane] = (batch * call.tokens() + token) * call.group * call.kv_heads + head;
    }
};

template <int NV>
static int forward(const Call& call, const Boxes& boxes) {
    constexpr int WIDTH = LANES * NV;
    const Side* side = boxes.side;
    const Sizes& sizes = call.sizes;
    const int64_t parts = (call.group + boxes.group - 1) / boxes.group;
    const int64_t tiles = int64_t(side[0].tiles) * side[1].tiles * side[2].tiles;

    return share(call.threads, tiles * parts * call.kv_heads * call.batch, side[2].tiles, [&](auto next) {
        Scratch scratch(sizeof(float) * WIDTH * (sizes.key + CHUNK + 16 + sizes.value_step));
        Tile<NV> tile;
        tile.columns = scratch.floats(WIDTH * sizes.key);
        tile.scores = scratch.floats(WIDTH * (CHUNK + 16));
        tile.out = scratch.floats(WIDTH * sizes.value_step);
        Lanes<NV> lanes;
        List box, extra;
        int32_t kind[3] = {-1, -1, -1};
        int64_t extra_of = -1;

        for (int64_t job = next(); job >= 0; job = next()) {
            const Place p = place(call, boxes, parts, job);
            if (std::memcmp(kind, p.kind, sizeof kind)) {
                list_box(call, boxes, p.kind, box);
                std::memcpy(kind, p.kind, sizeof kind);
            }
            if (extra_of != p.batch) list_extra(call, extra_of = p.batch, extra);
            lanes.find(call, boxes, p);
            gather_columns<NV>(tile.columns, lanes.q, sizes.key, call.scale * LOG2E);

            const int64_t rows = (p.batch * call.kv_heads + p.kv_head) * call.rows();
            const float *key = call.key + rows * sizes.key_step, *value = call.value + rows * sizes.value_step;
            int64_t first = 0;
            for (int a = 0; a < 3; a++) first = first * call.grid[a] + side[a].first[p.at[a]];
            auto attend = [&](bool careful) {
                tile.careful = careful;
                tile.start(sizes);
                tile.absorb(box.view(), key + first * sizes.key_step, value + first * sizes.value_step, sizes);
                tile.absorb(extra.view(), key, value, sizes);
                bool finite = true;
                for (int i = 0; i < WIDTH; i++)
                    if (const int64_t row = lanes.row[i]; row >= 0) {
                        finite &= tile.finish(i, call.out + row * sizes.value, sizes);
                        if (call.lse) call.lse[row] = tile.log_sum(i);
                    }
                return finite;
            };
            if (!attend(false)) attend(true);
        }
    });
}

extern "C" int vision_attn_lanes() { return LANES; }

extern "C" int vision_attn_forward_boxes(const Call* call, const Boxes* boxes) {
    return boxes->vectors == 2 ? forward<2>(*call, *boxes) : forward<1>(*call, *boxes);
}
