// CUDA kernels through the driver API. libcuda is opened at first use: nothing here needs a GPU, a driver or cuda.h to
// compile or to import.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include <dlfcn.h>

namespace driver {

namespace py = pybind11;

// The few types of the driver's ABI that are used, as cuda.h lays them out (stable since CUDA 11.8).
using Status = int;
using Device = int;
using Context = void*;
using Module = void*;
using Function = void*;
using Stream = void*;

struct LaunchAttribute {
    int id;
    char pad[4];
    union {
        char bytes[64];
        int programmatic_stream_serialization_allowed;
        struct { unsigned x, y, z; } cluster;
    } value;
};
static_assert(sizeof(LaunchAttribute) == 72, "CUlaunchAttribute");
constexpr int ATTRIBUTE_CLUSTER = 4, ATTRIBUTE_DEPENDENT_LAUNCH = 6;  // CUlaunchAttributeID

struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    Stream stream;
    LaunchAttribute* attributes;
    unsigned num_attributes;
};
static_assert(sizeof(LaunchConfig) == 56, "CUlaunchConfig");

constexpr int FUNCTION_MAX_DYNAMIC_SHARED = 8, FUNCTION_SHARED_CARVEOUT = 9;  // CUfunction_attribute

struct Api {
    Status (*init)(unsigned);
    Status (*driver_version)(int*);
    Status (*error_name)(Status, const char**);
    Status (*error_string)(Status, const char**);
    Status (*retain_primary)(Context*, Device);
    Status (*get_current)(Context*);
    Status (*push)(Context);
    Status (*pop)(Context*);
    Status (*load)(Module*, const void*);
    Status (*get_function)(Function*, Module, const char*);
    Status (*set_attribute)(Function, int, int);
    Status (*occupancy)(int*, Function, int, size_t);
    Status (*launch)(const LaunchConfig*, Function, void**, void**);
    Status (*encode_tiled)(void*, int, unsigned, void*, const std::uint64_t*, const std::uint64_t*, const unsigned*, const unsigned*,
                           int, int, int, int);  // null before CUDA 12
};

inline const Api& api() {
    static const Api loaded = [] {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
        if (!library) throw std::runtime_error(std::string("no NVIDIA driver here: ") + dlerror());
        Api a{};
        const auto find = [&](auto& pointer, const char* name) {
            void* symbol = dlsym(library, name);
            if (!symbol) throw std::runtime_error(std::string("the NVIDIA driver is too old: no ") + name);
            std::memcpy(&pointer, &symbol, sizeof symbol);
        };
        find(a.init, "cuInit");
        find(a.driver_version, "cuDriverGetVersion");
        find(a.error_name, "cuGetErrorName");
        find(a.error_string, "cuGetErrorString");
        find(a.retain_primary, "cuDevicePrimaryCtxRetain");
        find(a.get_current, "cuCtxGetCurrent");
        find(a.push, "cuCtxPushCurrent_v2");
        find(a.pop, "cuCtxPopCurrent_v2");
        find(a.load, "cuModuleLoadData");
        find(a.get_function, "cuModuleGetFunction");
        find(a.set_attribute, "cuFuncSetAttribute");
        find(a.occupancy, "cuOccupancyMaxActiveBlocksPerMultiprocessor");
        find(a.launch, "cuLaunchKernelEx");
        a.encode_tiled = reinterpret_cast<decltype(a.encode_tiled)>(dlsym(library, "cuTensorMapEncodeTiled"));
        if (a.init(0) != 0) throw std::runtime_error("cuInit failed: no usable NVIDIA device");
        return a;
    }();
    return loaded;
}

inline void check(Status status, const char* what) {
    if (status == 0) return;
    const char *name = "?", *text = "?";
    api().error_name(status, &name);
    api().error_string(status, &text);
    throw std::runtime_error(std::string(what) + ": " + name + " (" + text + ")");
}

// Makes a device's primary context, which torch uses too, current for a scope. Free where it is current already.
class Scope {
  public:
    explicit Scope(Context context) {
        Context current = nullptr;
        check(api().get_current(&current), "cuCtxGetCurrent");
        if (current != context) {
            check(api().push(context), "cuCtxPushCurrent");
            pushed_ = true;
        }
    }
    ~Scope() {
        Context ignored;
        if (pushed_) api().pop(&ignored);
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

  private:
    bool pushed_ = false;
};

// A kernel of one cubin on one device. It stays loaded for the process's life: graphs may hold it.
class CudaKernel {
  public:
    CudaKernel(const std::string& cubin, const std::string& symbol, Device device, int threads, int shared_bytes,
               std::array<int, 3> cluster, bool dependent)
        : threads_(threads), shared_(shared_bytes), cluster_(cluster), dependent_(dependent) {
        check(api().retain_primary(&context_, device), "cuDevicePrimaryCtxRetain");
        Scope scope(context_);
        Module module;
        check(api().load(&module, cubin.data()), "cuModuleLoadData");
        check(api().get_function(&function_, module, symbol.c_str()), "cuModuleGetFunction");
        if (shared_bytes > 48 * 1024)
            check(api().set_attribute(function_, FUNCTION_MAX_DYNAMIC_SHARED, shared_bytes), "cuFuncSetAttribute");
        check(api().set_attribute(function_, FUNCTION_SHARED_CARVEOUT, 100), "cuFuncSetAttribute");
    }

    int blocks_per_sm() const {
        Scope scope(context_);
        int blocks = 0;
        check(api().occupancy(&blocks, function_, threads_, (size_t)shared_), "cuOccupancyMaxActiveBlocksPerMultiprocessor");
        return blocks;
    }

    // Launches on `stream` (a cudaStream_t as an integer). The struct is copied: it may change at once.
    void launch(const void* params, unsigned grid_x, unsigned grid_y, std::uintptr_t stream) const {
        LaunchAttribute attributes[2];
        unsigned count = 0;
        if (dependent_) {
            attributes[count].id = ATTRIBUTE_DEPENDENT_LAUNCH;
            attributes[count++].value.programmatic_stream_serialization_allowed = 1;
        }
        if (cluster_[0] * cluster_[1] * cluster_[2] > 1) {
            attributes[count].id = ATTRIBUTE_CLUSTER;
            attributes[count++].value.cluster = {(unsigned)cluster_[0], (unsigned)cluster_[1], (unsigned)cluster_[2]};
        }
        const LaunchConfig config{{grid_x, grid_y, 1}, {(unsigned)threads_, 1, 1}, (unsigned)shared_,
                                  reinterpret_cast<Stream>(stream), attributes, count};
        void* arguments[] = {const_cast<void*>(params)};
        Scope scope(context_);
        check(api().launch(&config, function_, arguments, nullptr), "cuLaunchKernelEx");
    }

    void launch_buffer(py::handle params, unsigned grid_x, unsigned grid_y, std::uintptr_t stream) const {
        Py_buffer view;
        if (PyObject_GetBuffer(params.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
        const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> held(&view, PyBuffer_Release);
        launch(view.buf, grid_x, grid_y, stream);
    }

  private:
    Context context_ = nullptr;
    Function function_ = nullptr;
    int threads_, shared_;
    std::array<int, 3> cluster_;
    bool dependent_;
};

// A CUtensorMap of a tensor of 16-bit elements at `address`, innermost dimension first: sizes, strides of all but the first in
// bytes, and the box that one copy takes. The box is as wide as a swizzled row of a panel, 128 or 64 bytes. Outside the tensor
// a copy writes zeros, or with nan_fill NaN.
inline py::bytes tensor_map(std::uintptr_t address, bool bf16, std::array<std::uint64_t, 4> sizes, std::array<std::uint64_t, 3> strides,
                            std::array<unsigned, 4> box, bool nan_fill) {
    constexpr int FLOAT16 = 6, BFLOAT16 = 9, NO_INTERLEAVE = 0, SWIZZLE_64B = 2, SWIZZLE_128B = 3, PROMOTE_256B = 3;
    struct alignas(64) { char bytes[128]; } map;
    const unsigned steps[4] = {1, 1, 1, 1};
    if (!api().encode_tiled) throw std::runtime_error("the NVIDIA driver is too old: no cuTensorMapEncodeTiled");
    check(api().encode_tiled(&map, bf16 ? BFLOAT16 : FLOAT16, 4, reinterpret_cast<void*>(address), sizes.data(), strides.data(), box.data(),
                             steps, NO_INTERLEAVE, box[0] == 64 ? SWIZZLE_128B : SWIZZLE_64B, PROMOTE_256B, nan_fill),
          "cuTensorMapEncodeTiled");
    return py::bytes(map.bytes, sizeof map);
}

inline int version() {
    int found = 0;
    check(api().driver_version(&found), "cuDriverGetVersion");
    return found;
}

inline void bind(py::module_& m) {
    m.def("driver_version", &version);
    m.def("tensor_map", &tensor_map, py::arg("address"), py::arg("bf16"), py::arg("sizes"), py::arg("strides"), py::arg("box"),
          py::arg("nan_fill"));
    py::class_<CudaKernel>(m, "CudaKernel")
        .def(py::init([](py::bytes cubin, const std::string& symbol, int device, int threads, int shared_bytes,
                         std::array<int, 3> cluster, bool dependent) {
                 return new CudaKernel(std::string(cubin), symbol, device, threads, shared_bytes, cluster, dependent);
             }),
             py::arg("cubin"), py::arg("symbol"), py::arg("device"), py::arg("threads"), py::arg("shared_bytes"),
             py::arg("cluster") = std::array<int, 3>{1, 1, 1}, py::arg("dependent") = false)
        .def("blocks_per_sm", &CudaKernel::blocks_per_sm)
        .def("launch", &CudaKernel::launch_buffer, py::arg("params"), py::arg("grid_x"), py::arg("grid_y"), py::arg("stream"));
}

}  // namespace driver
