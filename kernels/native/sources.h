// Where tiles come from: boxes of the grid for separable patterns, rows of block lists for the others. A source knows how
// many tiles each KV head of a batch entry has, and for any of them the queries in its lanes and the keys they need.
#pragma once
#include "call.h"

struct List {
    std::vector<int32_t> token;
    std::vector<uint32_t> lanes;
    int64_t count = 0;
    void clear() { token.clear(), lanes.clear(), count = 0; }
    void add(int64_t number, uint32_t seen) { token.push_back((int32_t)number), lanes.push_back(seen); }
    void close() {
        count = token.size();
        while (token.size() % EIGHT) add(token.back(), 0);
    }
    Keys view() const { return {count, token.data(), lanes.data()}; }
};

// Every lane sees the extra tokens that are visible; they stand behind those of the grid.
static void list_extra(const Call& call, int64_t batch, List& list) {
    list.clear();
    for (int t = 0; t < call.extra; t++)
        if (!call.visible || call.visible[batch * call.extra + t]) list.add(call.tokens() + t, ~0u);
    list.close();
}

// Where the queries of a tile are: null and -1 where a lane has none.
template <int NV>
struct Lanes {
    const float* q[LANES * NV];
    int64_t row[LANES * NV];  // in [batch, tokens, heads]

    void clear(int lane) { q[lane] = nullptr, row[lane] = -1; }
    void set(const Call& call, int lane, int64_t batch, int64_t head, int64_t i, int64_t j, int64_t k) {
        const int64_t token = (i * call.grid[1] + j) * call.grid[2] + k;
        q[lane] = call.q.at(batch, head, i, j, k);
        row[lane] = (batch * call.tokens() + token) * call.group * call.kv_heads + head;
    }
};

template <int NV>
struct BoxSource {
    const Call& call;
    const Boxes& boxes;
    const Side* side = boxes.side;
    Lanes<NV> lanes;
    std::vector<List> lists;  // of every kind of tile that came up, when they are few; else only the last
    int64_t kinds = 1, keys = 1;  // of tiles, and the keys of one tile of each
    int64_t last = -1, now = 0, split = 0;
    int64_t first = 0;  // token that the list counts from

    BoxSource(const Call& call, const Boxes& boxes) : call(call), boxes(boxes) {
        for (int a = 0; a < 3; a++) kinds *= side[a].kinds, keys *= side[a].start[side[a].kinds];
        lists.resize(keys <= 1 << 20 ? kinds : 1);
    }
    const List& list() const { return lists[lists.size() > 1 ? now : 0]; }
    static int64_t splits(const Call& call, const Boxes& boxes) { return (call.group + boxes.group - 1) / boxes.group; }
    static int64_t tiles(const Call& call, const Boxes& boxes) {
        const Side* s = boxes.side;
        return splits(call, boxes) * s[0].tiles * s[1].tiles * s[2].tiles;
    }
    static int64_t run(const Call&, const Boxes& boxes) { return boxes.side[2].tiles; }

    // How many tiles of a KV head differ, 0 when their lists are not kept, and which of them this is; pairs of key and tile
    // in all of those.
    int64_t alike() const { return (int64_t)lists.size() == kinds ? splits(call, boxes) * kinds : 0; }
    int64_t like() const { return split * kinds + now; }
    int64_t pairs() const { return splits(call, boxes) * keys; }

    // First and last token of the grid among the keys of a tile.
    void reach(int64_t tile, int64_t& low, int64_t& high) const {
        int64_t step = 1;
        low = high = 0;
        for (int a = 2; a >= 0; a--) {
            const int64_t at = tile % side[a].tiles, from = side[a].first[at];
            const int32_t last = side[a].key[side[a].start[side[a].kind[at] + 1] - 1];
            low += from * step, high += (from + last) * step;
            tile /= side[a].tiles, step *= call.grid[a];
        }
    }

    void open(int64_t batch, int64_t kv_head, int64_t tile) {
        int64_t at[3], step = 1;
        now = 0;
        for (int a = 2; a >= 0; a--) {
            at[a] = tile % side[a].tiles, tile /= side[a].tiles;
            now += side[a].kind[at[a]] * step, step *= side[a].kinds;
        }
        if (lists.size() > 1 ? lists[now].token.empty() : now != last) list_keys(lists[lists.size() > 1 ? now : 0], at);
        last = now;
        split = tile, first = 0;
        for (int a = 0; a < 3; a++) first = first * call.grid[a] + side[a].first[at[a]];
        int lane = 0;
        for (int64_t g = tile * boxes.group; g < (tile + 1) * boxes.group; g++)
            for (int x = 0; x < side[0].lanes; x++)
                for (int y = 0; y < side[1].lanes; y++)
                    for (int z = 0; z < side[2].lanes; z++, lane++) {
                        const int64_t i = side[0].query[at[0] * side[0].lanes + x];
                        const int64_t j = side[1].query[at[1] * side[1].lanes + y];
                        const int64_t k = side[2].query[at[2] * side[2].lanes + z];
                        if (g < call.group && i >= 0 && j >= 0 && k >= 0)
                            lanes.set(call, lane, batch, kv_head * call.group + g, i, j, k);
                        else
                            lanes.clear(lane);
                    }
        for (; lane < LANES * NV; lane++) lanes.clear(lane);
    }

    // The keys of the tiles that are like this one, relative to the first of them.
    void list_keys(List& list, const int64_t* at) {
        int from[3], to[3];
        for (int a = 0; a < 3; a++) {
            const int32_t* start = side[a].start + side[a].kind[at[a]];
            from[a] = start[0], to[a] = start[1];
        }
        list.clear();
        for (int x = from[0]; x < to[0]; x++)
            for (int y = from[1]; y < to[1]; y++) {
                const int64_t line = ((int64_t)side[0].key[x] * call.grid[1] + side[1].key[y]) * call.grid[2];
                const uint32_t seen = side[0].seen[x] & side[1].seen[y];
                for (int z = from[2]; z < to[2]; z++) {
                    uint32_t both = seen & side[2].seen[z];
                    if (boxes.radius) both &= disc(at, side[1].key[y], side[2].key[z]);
                    if (both) list.add(line + side[2].key[z], both);
                }
            }
        list.close();
    }

    // The lanes of a tile that are near enough to a key, which is given relative to the first.
    uint32_t disc(const int64_t* at, int64_t y, int64_t z) const {
        const int32_t *rows = side[1].query + at[1] * side[1].lanes, *columns = side[2].query + at[2] * side[2].lanes;
        uint32_t near = 0, bit = 1;
        for (int outer = 0; outer < boxes.group * side[0].lanes; outer++)
            for (int i = 0; i < side[1].lanes; i++)
                for (int j = 0; j < side[2].lanes; j++, bit <<= 1) {
                    const int64_t dy = side[1].first[at[1]] + y - rows[i], dx = side[2].first[at[2]] + z - columns[j];
                    if (dy * dy + dx * dx < (int64_t)boxes.radius * boxes.radius) near |= bit;
                }
        return near;
    }
};

template <int NV>
struct BlockSource {
    static constexpr int WIDTH = LANES * NV;
    const Call& call;
    const Blocks& blocks;
    Lanes<NV> lanes;
    List keys;
    static constexpr int64_t first = 0;
    static constexpr int64_t alike() { return 0; }  // these have no relative bias
    static constexpr int64_t like() { return 0; }
    static constexpr int64_t pairs() { return 0; }

    BlockSource(const Call& call, const Blocks& blocks) : call(call), blocks(blocks) {}
    const List& list() const { return keys; }
    static int64_t pieces(const Blocks& blocks) { return (blocks.query + WIDTH - 1) / WIDTH; }
    static int64_t tiles(const Call& call, const Blocks& blocks) { return call.group * blocks.rows * pieces(blocks); }
    static int64_t run(const Call&, const Blocks& blocks) { return pieces(blocks); }

    void reach(int64_t, int64_t& low, int64_t& high) const { low = 0, high = call.tokens() - 1; }

    void open(int64_t batch, int64_t kv_head, int64_t tile) {
        const int64_t piece = tile % pieces(blocks), row = tile / pieces(blocks) % blocks.rows;
        const int64_t head = kv_head * call.group + tile / pieces(blocks) / blocks.rows;
        for (int i = 0; i < WIDTH; i++) {
            const int64_t in = piece * WIDTH + i, token = row * blocks.query + in, plane = token / call.grid[2];
            if (in < blocks.query && token < call.tokens())
                lanes.set(call, i, batch, head, plane / call.grid[1], plane % call.grid[1], token % call.grid[2]);
            else
                lanes.clear(i);
        }
        list_keys(batch * blocks.batch + head * blocks.head + row, piece * WIDTH);
    }

    void list_keys(int64_t row, int64_t query) {
        keys.clear();
        const int64_t words = (blocks.query + 31) / 32;
        for (int32_t slot = 0; slot < blocks.count[row]; slot++) {
            const int64_t start = (int64_t)blocks.index[row * blocks.slots + slot] * blocks.key;
            const int64_t rest = call.tokens() - start, count = rest < blocks.key ? rest : blocks.key;
            const int32_t number = blocks.mask ? blocks.mask[row * blocks.slots + slot] : -1;
            if (number < 0) {
                for (int64_t j = 0; j < count; j++) keys.add(start + j, ~0u);
                continue;
            }
            const uint32_t* bits = blocks.bits + (number * words + query / 32) * blocks.key;
            for (int64_t j = 0; j < count; j++)
                if (const uint32_t seen = bits[j] >> query % 32 & (uint32_t)((1ull << WIDTH) - 1)) keys.add(start + j, seen);
        }
        keys.close();
    }
};
