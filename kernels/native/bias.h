// Relative biases of separable patterns. The entry of a pair is place[key] - place[query] + middle, so all that a tile needs
// is laid out once as its scores are, [key, lane], for every tile that looks like it: adding it is then one load per vector.
// The gradients are summed in the same layout, and brought to their entries when a thread is through with a job.
#pragma once
#include "sources.h"

constexpr int64_t MOST_BIASES = 1 << 21;  // floats kept per thread; beyond, each tile has its own made

template <int NV>
class TileBias {
    static constexpr int WIDTH = LANES * NV;
    struct Part {
        const List* list = nullptr;
        const int32_t* place;  // of the keys that the list names
        int32_t own[WIDTH];    // what to take off to have the entry, among those of the KV head
        uint32_t lanes;        // that have a query
        bool touched = false;
        std::vector<float> bias, slopes;  // [keys, WIDTH]
    };
    const Call& call;
    const int64_t alike;
    const int32_t most = (int32_t)std::min<int64_t>(call.group * call.entries - 1, INT32_MAX);  // last entry of a KV head
    std::vector<Part> parts;  // [kv_heads, alike], or one for the tile at hand

  public:
    template <class Source>
    TileBias(const Call& call, const Source& source)
        : call(call), alike(source.pairs() * WIDTH * call.kv_heads <= MOST_BIASES ? source.alike() : 0) {
        if (call.bias) parts.resize(alike ? alike * call.kv_heads : 1);
    }

    // Have the bias of the tile that `source` is at, and room for its gradients, beside its keys.
    template <class Source>
    void give(Keys& keys, const Source& source, int64_t kv_head) {
        if (!call.bias) return;
        Part& part = parts[alike ? kv_head * alike + source.like() : 0];
        if (!alike || !part.list) make(part, source.list(), source.first, source.lanes, kv_head);
        keys.bias = part.bias.data();
        if (!call.d_bias) return;
        part.slopes.resize(part.bias.size());
        part.touched = true;
        keys.slopes = part.slopes.data();
    }

    // Add the gradients of the tiles since the last time to `into`, the entries of a KV head. `last`: they are the last ones.
    void collect(float* into, bool last) {
        if (alike && !last) return;
        for (Part& part : parts)
            if (part.touched) {
                pairs(part, [&](int64_t at, bool seen, int32_t entry) {
                    if (seen) into[entry] += part.slopes[at];
                });
                std::fill(part.slopes.begin(), part.slopes.end(), 0.0f);
                part.touched = false;
            }
    }

  private:
    void make(Part& part, const List& list, int64_t first, const Lanes<NV>& lanes, int64_t kv_head) {
        const float* table = call.bias + kv_head * call.group * call.entries;
        part.list = &list, part.place = call.place + first, part.lanes = 0;
        for (int i = 0; i < WIDTH; i++) {
            const int64_t row = lanes.row[i], heads = call.group * call.kv_heads;
            part.own[i] = 0;
            if (row < 0) continue;
            part.own[i] = int32_t(call.place[row / heads % call.tokens()] - call.middle - row % call.group * call.entries);
            part.lanes |= 1u << i;
        }
        part.bias.resize(list.token.size() * WIDTH);
        pairs(part, [&](int64_t at, bool seen, int32_t entry) { part.bias[at] = seen ? table[entry] * LOG2E : 0; });
    }

    // Entries that no lane sees, or out of reach, are kept inside of the table.
    template <class Work>
    INLINE void pairs(const Part& part, Work work) const {
        for (size_t j = 0; j < part.list->token.size(); j++) {
            const int32_t place = part.place[part.list->token[j]];
            const uint32_t seen = part.list->lanes[j] & part.lanes;
            for (int i = 0; i < WIDTH; i++)
                work(j * WIDTH + i, seen >> i & 1, std::clamp(place - part.own[i], 0, most));
        }
    }
};
