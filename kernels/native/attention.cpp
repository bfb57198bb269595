// Attention of grid tokens on a CPU, with a plain C interface. See tile.h for the arithmetic.
#include "call.h"
#include "tile.h"

// Queries of a tile as columns, times `scale`: [dim, WIDTH]. Lanes without a query get zeros.
template <int NV>
static void gather_columns(float* columns, const float* base, const int64_t* lane, int dim, float scale) {
    constexpr int WIDTH = LANES * NV;
    for (int i = 0; i < WIDTH; i++)
        for (int d = 0; d < dim; d++) columns[d * WIDTH + i] = lane[i] < 0 ? 0.0f : base[lane[i] + d] * scale;
}

struct Lists {
    std::vector<int64_t> key, value;
    std::vector<uint32_t> lanes;
    void clear() { key.clear(), value.clear(), lanes.clear(); }
    void add(int64_t k, int64_t v, uint32_t seen) { key.push_back(k), value.push_back(v), lanes.push_back(seen); }
    Keys view() const { return {(int64_t)key.size(), key.data(), value.data(), lanes.data()}; }
};

static void list_extra(const Call& call, int64_t batch, Lists& lists) {
    lists.clear();
    for (int t = 0; t < call.extra; t++)
        if (!call.visible || call.visible[batch * call.extra + t])
            lists.add(t * call.extra_key.axis[0], t * call.extra_value.axis[0], ~0u);
}

// The keys of all tiles of one kind, relative to their first key.
static void list_box(const Call& call, const Boxes& boxes, const int32_t* kind, Lists& lists) {
    const Side* side = boxes.side;
    auto range = [&](int a, int& from, int& to) { from = side[a].start[kind[a]], to = side[a].start[kind[a] + 1]; };
    int from[3], to[3];
    for (int a = 0; a < 3; a++) range(a, from[a], to[a]);
    lists.clear();
    for (int x = from[0]; x < to[0]; x++)
        for (int y = from[1]; y < to[1]; y++)
            for (int z = from[2]; z < to[2]; z++) {
                int64_t at[3] = {side[0].key[x], side[1].key[y], side[2].key[z]}, key = 0, value = 0;
                for (int a = 0; a < 3; a++) key += at[a] * call.k.axis[a], value += at[a] * call.v.axis[a];
                if (uint32_t seen = side[0].seen[x] & side[1].seen[y] & side[2].seen[z]) lists.add(key, value, seen);
            }
}

template <int NV>
static int forward(const Call& call, const Boxes& boxes) {
    constexpr int WIDTH = LANES * NV;
    const Side* side = boxes.side;
    const Sizes sizes{call.head_dim, call.value_dim};
    const int64_t parts = (call.group + boxes.group - 1) / boxes.group;
    const int64_t tiles = int64_t(side[0].tiles) * side[1].tiles * side[2].tiles;
    const int64_t jobs = tiles * parts * call.kv_heads * call.batch;

    return share(call.threads, jobs, side[2].tiles, [&](auto next) {
        Scratch scratch(sizeof(float) * WIDTH * (call.head_dim + CHUNK + 16 + call.value_dim));
        Tile<NV> tile;
        tile.columns = scratch.floats(WIDTH * call.head_dim);
        tile.scores = scratch.floats(WIDTH * (CHUNK + 16));
        tile.out = scratch.floats(WIDTH * call.value_dim);
        Lists box, extra;
        int32_t kind[3], last[3] = {-1, -1, -1};
        int64_t extra_of = -1;

        for (int64_t job = next(); job >= 0; job = next()) {
            int64_t at[3], rest = job;
            for (int a = 2; a >= 0; a--) at[a] = rest % side[a].tiles, rest /= side[a].tiles;
            const int64_t part = rest % parts, kv_head = rest / parts % call.kv_heads;
            const int64_t batch = rest / parts / call.kv_heads;
            for (int a = 0; a < 3; a++) kind[a] = side[a].kind[at[a]];
            if (std::memcmp(kind, last, sizeof kind)) {
                list_box(call, boxes, kind, box);
                std::memcpy(last, kind, sizeof kind);
            }
            if (extra_of != batch) list_extra(call, extra_of = batch, extra);

            int64_t query[WIDTH], out[WIDTH], lse[WIDTH], key = 0, value = 0;
            for (int a = 0; a < 3; a++) {
                key += side[a].first[at[a]] * call.k.axis[a];
                value += side[a].first[at[a]] * call.v.axis[a];
            }
            int lane = 0;
            for (int g = 0; g < boxes.group; g++)
                for (int x = 0; x < side[0].lanes; x++)
                    for (int y = 0; y < side[1].lanes; y++)
                        for (int z = 0; z < side[2].lanes; z++, lane++) {
                            const int64_t head = part * boxes.group + g;
                            const int32_t spot[3] = {side[0].query[at[0] * side[0].lanes + x],
                                                     side[1].query[at[1] * side[1].lanes + y],
                                                     side[2].query[at[2] * side[2].lanes + z]};
                            const bool real = head < call.group && spot[0] >= 0 && spot[1] >= 0 && spot[2] >= 0;
                            query[lane] = out[lane] = lse[lane] = -1;
                            if (!real) continue;
                            auto offset = [&](const Rows& rows) {
                                return head * rows.head + spot[0] * rows.axis[0] + spot[1] * rows.axis[1] +
                                       spot[2] * rows.axis[2];
                            };
                            query[lane] = offset(call.q), out[lane] = offset(call.out), lse[lane] = offset(call.lse);
                        }
            for (; lane < WIDTH; lane++) query[lane] = out[lane] = lse[lane] = -1;

            const int64_t first_head = kv_head * call.group;
            gather_columns<NV>(tile.columns, call.q.at(batch, first_head), query, call.head_dim, call.scale * LOG2E);
            auto attend = [&](bool careful) {
                tile.careful = careful;
                tile.start(sizes);
                tile.absorb(box.view(), call.k.at(batch, kv_head) + key, call.v.at(batch, kv_head) + value, sizes);
                tile.absorb(extra.view(), call.extra_key.at(batch, kv_head), call.extra_value.at(batch, kv_head), sizes);
                bool finite = true;
                for (int i = 0; i < WIDTH; i++)
                    if (out[i] >= 0) {
                        finite &= tile.finish(i, call.out.at(batch, first_head) + out[i], call.value_dim);
                        if (call.lse.data) call.lse.at(batch, first_head)[lse[i]] = tile.log_sum(i);
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
