// The host extension: the one compiled module that attngen has, and the only code that knows both Python and kernels.
//
// It loads kernels (plain C ABI libraries) and launches them with a packed parameter struct. It includes no torch
// header: it compiles in seconds, once a Python version, and works with any torch.

#include <pybind11/pybind11.h>

#include "calls.h"
#include "driver.h"

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include <dlfcn.h>
#include <pthread.h>

namespace py = pybind11;

namespace {

// ---- forked children ------------------------------------------------------------------------------------------------
//
// An OpenMP runtime keeps its worker threads in a pool that hangs off the thread which opened the parallel region. A
// forked child inherits that bookkeeping but none of the workers, and waits for them forever in its first parallel
// region. Only the thread that called fork() lives on in the child, so only that thread is affected: its kernels run on
// a helper thread, born in the child, which owns no pool yet and so gets a fresh one.

using Kernel = int (*)(const void* params);

class Helper {
  public:
    int run(Kernel kernel, const void* params) {
        std::unique_lock lock(mutex_);
        if (!started_) {
            std::thread(&Helper::serve, this).detach();
            started_ = true;
        }
        kernel_ = kernel;
        params_ = params;
        changed_.notify_all();
        changed_.wait(lock, [this] { return kernel_ == nullptr; });
        return status_;
    }

  private:
    void serve() {
        std::unique_lock lock(mutex_);
        for (;;) {
            changed_.wait(lock, [this] { return kernel_ != nullptr; });
            status_ = kernel_(params_);
            kernel_ = nullptr;
            changed_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    Kernel kernel_ = nullptr;  // the request; null when it is done
    const void* params_ = nullptr;
    int status_ = 0;
    bool started_ = false;
};

thread_local Helper* helper = nullptr;  // set in the one thread that lived through a fork

void after_fork_in_child() { helper = new Helper; }  // the parent's helper, if any, has no thread here: never freed

int run_kernel(Kernel kernel, const void* params) {
    return helper ? helper->run(kernel, params) : kernel(params);
}

// ---- CPU kernels ----------------------------------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

// Opens a kernel library and returns the address of attngen_attention. The library stays open for the process's life:
// its OpenMP threads may still stand in its code.
std::uintptr_t load_cpu(const std::string& path, const std::string& abi) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) fail(dlerror());
    const char* found = static_cast<const char*>(dlsym(library, "attngen_abi"));
    void* kernel = dlsym(library, "attngen_attention");
    if (found && kernel && abi == found) return reinterpret_cast<std::uintptr_t>(kernel);
    std::string what = !found    ? "no symbol attngen_abi"
                       : !kernel ? "no symbol attngen_attention"
                                 : "launch ABI " + std::string(found);
    dlclose(library);
    fail(what);
}

class ReadableBuffer {
  public:
    explicit ReadableBuffer(PyObject* object) {
        if (PyObject_GetBuffer(object, &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
    }
    ~ReadableBuffer() { PyBuffer_Release(&view_); }
    ReadableBuffer(const ReadableBuffer&) = delete;
    ReadableBuffer& operator=(const ReadableBuffer&) = delete;
    const void* data() const { return view_.buf; }

  private:
    Py_buffer view_;
};

// Runs a kernel on its packed parameter struct, without the GIL. The buffer must not change until this returns.
void launch_cpu(std::uintptr_t kernel, py::handle params) {
    ReadableBuffer buffer(params.ptr());
    int status;
    {
        py::gil_scoped_release unlocked;
        status = run_kernel(reinterpret_cast<Kernel>(kernel), buffer.data());
    }
    if (status != 0) fail("a CPU kernel returned status " + std::to_string(status));
}

}  // namespace

#ifndef ATTNGEN_HOST_DIGEST
#error "define ATTNGEN_HOST_DIGEST as the sha256 of the files of this folder: a build that is older than its source is not loaded"
#endif

PYBIND11_MODULE(_host, m) {
    m.doc() = "Loads and launches attngen's kernels.";
    m.attr("digest") = ATTNGEN_HOST_DIGEST;
    m.def("load_cpu", &load_cpu, py::arg("path"), py::arg("abi"));
    m.def("launch_cpu", &launch_cpu, py::arg("kernel"), py::arg("params"));
    driver::bind(m);
    calls::bind(m);
    pthread_atfork(nullptr, nullptr, after_fork_in_child);
}
