// Index arrays of packed samples and of blends, behind megatron.data.index_builder.
//
// sample_index: sample i starts at token i * seq_length of the stream that the ordered sequences make end to end. One walk over the
// sequences, O(sequences + samples); it reads 8 bytes a sequence and writes 8 or 16 a sample. Sequences without tokens hold no start.
//
// blend_index: draw k comes from the part that is furthest behind its share, the largest weight * max(k, 1) - used, ties to the
// lowest part. O(draws * parts), 9 bytes written a draw. The sums are double and in this order, because the order of samples of
// every run ever started depends on them.
//
// Both run without the interpreter's lock and check what they index with.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

namespace {

struct Stream {
    const int32_t* sizes;  // tokens of each sequence
    int64_t num_sequences;
    const int32_t* order;  // the sequences, in the order they are read
    int64_t order_length;
};

// Arrays mapped from a file may lie anywhere; what is read here as numbers must lie where numbers do.
template <typename T>
void check_aligned(const Array<T>& values, const char* name) {
    if (reinterpret_cast<std::uintptr_t>(values.data()) % alignof(T) != 0) {
        throw std::invalid_argument(std::string(name) + " does not lie on a multiple of " + std::to_string(alignof(T)) +
                                    " bytes in memory: pass an aligned copy of it.");
    }
}

int32_t size_at(const Stream& stream, int64_t position) {
    const int32_t sequence = stream.order[position];
    if (sequence < 0 || sequence >= stream.num_sequences) {
        throw std::invalid_argument("doc_idx names sequence " + std::to_string(sequence) + ", but there are " +
                                    std::to_string(stream.num_sequences) + ": build the index for the data it is used with.");
    }
    return stream.sizes[sequence];
}

template <typename T>
void fill_sample_index(const Stream& stream, int64_t seq_length, int64_t num_samples, T* rows) {
    int64_t position = -1;  // in order
    int64_t begin = 0;      // first token of that sequence in the stream
    int64_t end = 0;        // one past its last
    for (int64_t sample = 0; sample <= num_samples; ++sample) {
        const int64_t start = sample * seq_length;
        while (start >= end) {
            if (++position >= stream.order_length) {
                throw std::invalid_argument("the sequences hold " + std::to_string(end) + " tokens, too few for " + std::to_string(num_samples) +
                                            " samples of " + std::to_string(seq_length) + " tokens and one more.");
            }
            begin = end;
            end += size_at(stream, position);
        }
        if (position > static_cast<int64_t>(std::numeric_limits<T>::max())) {
            throw std::invalid_argument("position " + std::to_string(position) + " in doc_idx does not fit the 32 bits of sample_idx.");
        }
        rows[2 * sample] = static_cast<T>(position);
        rows[2 * sample + 1] = static_cast<T>(start - begin);
    }
}

template <typename T>
py::array_t<T> sample_index(const Array<int32_t>& sizes, const Array<int32_t>& order, int64_t seq_length, int64_t num_samples) {
    if (sizes.ndim() != 1 || order.ndim() != 1 || seq_length < 1 || num_samples < 0) {
        throw std::invalid_argument("sample_index takes rows of sizes and order, seq_length of at least 1, and num_samples of at least 0.");
    }
    check_aligned(sizes, "sizes");
    check_aligned(order, "order");
    if (num_samples >= std::numeric_limits<int64_t>::max() / seq_length) {
        throw std::invalid_argument(std::to_string(num_samples) + " samples of " + std::to_string(seq_length) +
                                    " tokens are more than 64 bits can count.");
    }
    py::array_t<T> rows({num_samples + 1, int64_t{2}});
    const Stream stream{sizes.data(), sizes.size(), order.data(), order.size()};
    T* out = rows.mutable_data();
    {
        py::gil_scoped_release unlocked;
        fill_sample_index(stream, seq_length, num_samples, out);
    }
    return rows;
}

py::tuple blend_index(const Array<double>& weights, int64_t size) {
    const int64_t num_parts = weights.size();
    if (weights.ndim() != 1 || num_parts < 1 || num_parts >= 255 || size < 0) {
        throw std::invalid_argument("blend_index takes 1 to 254 weights and a size of at least 0, and was given " + std::to_string(num_parts) +
                                    " weights and size " + std::to_string(size) + ".");
    }
    check_aligned(weights, "weights");
    py::array_t<uint8_t> parts(size);
    py::array_t<int64_t> rows(size);
    uint8_t* part_out = parts.mutable_data();
    int64_t* row_out = rows.mutable_data();
    const double* weight = weights.data();
    {
        py::gil_scoped_release unlocked;
        std::vector<int64_t> used(num_parts, 0);
        for (int64_t draw = 0; draw < size; ++draw) {
            const double draws = static_cast<double>(std::max<int64_t>(draw, 1));
            int64_t chosen = 0;
            double furthest = weight[0] * draws - static_cast<double>(used[0]);
            for (int64_t part = 1; part < num_parts; ++part) {
                const double behind = weight[part] * draws - static_cast<double>(used[part]);
                if (behind > furthest) {
                    furthest = behind;
                    chosen = part;
                }
            }
            part_out[draw] = static_cast<uint8_t>(chosen);
            row_out[draw] = used[chosen]++;
        }
    }
    return py::make_tuple(parts, rows);
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, module) {
    module.doc() = "Index arrays of packed samples and of blends; see the head of csrc/dataset_index.cpp.";
    module.def("sample_index_int32", &sample_index<int32_t>, py::arg("sizes"), py::arg("order"), py::kw_only(), py::arg("seq_length"),
               py::arg("num_samples"));
    module.def("sample_index_int64", &sample_index<int64_t>, py::arg("sizes"), py::arg("order"), py::kw_only(), py::arg("seq_length"),
               py::arg("num_samples"));
    module.def("blend_index", &blend_index, py::arg("weights"), py::arg("size"));
}
