// Plans and runs of a batch that repeat: once Python has checked a call, its like is recognised by shapes, strides, dtypes and
// devices, and launched from here, a tenth of the work. Whatever is not like a known call is left to Python, errors included.
#pragma once

#include "driver.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace calls {

namespace py = pybind11;

// ---- what is seen of a tensor ----------------------------------------------------------------------------------------

constexpr int MOST_DIMS = 6;

struct Seen {
    std::uintptr_t data = 0;
    std::int64_t device = 0, dtype = 0, dims = 0;
    std::array<std::int64_t, MOST_DIMS> shape{}, strides{};

    bool like(const Seen& other) const {
        return device == other.device && dtype == other.dtype && dims == other.dims && shape == other.shape && strides == other.strides;
    }
};

// The C functions that torch exports with its tensors (DLPack 1.3, torch 2.10), as dlpack.h lays them out.
struct DLTensor {
    void* data;
    struct { std::int32_t type, index; } device;
    std::int32_t dims;
    struct { std::uint8_t code, bits; std::uint16_t lanes; } dtype;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};
static_assert(sizeof(DLTensor) == 48, "DLTensor");
struct Exchange {
    std::uint32_t major, minor;
    Exchange* previous;
    void *allocate, *from_object, *to_object;
    int (*see)(void* object, DLTensor* found);
    void* current_stream;
};

// How tensors are read: by those functions, or by their Python attributes.
class Reader {
  public:
    Reader() {
        const py::module_ torch = py::module_::import("torch");
        tensor_ = torch.attr("Tensor"), parameter_ = torch.attr("nn").attr("Parameter");
        grad_enabled_ = torch.attr("is_grad_enabled");
        if (py::object capsule = py::getattr(tensor_, "__dlpack_c_exchange_api__", py::none()); PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
            for (auto* api = (const Exchange*)PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"); api; api = api->previous)
                if (api->major == 1) exchange_ = api->see;
    }

    // False for what is no plain tensor, or one that cannot be told by its shape and strides alone.
    bool see(PyObject* object, Seen& seen) const {
        if (Py_TYPE(object) != (PyTypeObject*)tensor_.ptr() && Py_TYPE(object) != (PyTypeObject*)parameter_.ptr()) return false;
        if (is(object, is_neg_)) return false;
        return exchange_ ? by_exchange(object, seen) : by_attributes(object, seen);
    }

    bool grad_enabled() const { return truth(PyObject_CallNoArgs(grad_enabled_.ptr())); }
    bool requires_grad(PyObject* tensor) const { return truth(PyObject_GetAttr(tensor, requires_grad_.ptr())); }

  private:
    static bool truth(PyObject* found) {  // takes the reference
        if (!found) throw py::error_already_set();
        const bool yes = found == Py_True;
        Py_DECREF(found);
        return yes;
    }
    static bool is(PyObject* object, const py::str& method) { return truth(PyObject_CallMethodNoArgs(object, method.ptr())); }

    bool by_exchange(PyObject* object, Seen& seen) const {
        DLTensor t;
        if (exchange_(object, &t) != 0) {
            PyErr_Clear();
            return false;
        }
        if (t.dims > MOST_DIMS) return false;
        seen.data = (std::uintptr_t)t.data + t.byte_offset;
        seen.device = (std::int64_t)t.device.type << 32 | (std::uint32_t)t.device.index;
        seen.dtype = (std::int64_t)t.dtype.code << 32 | t.dtype.bits << 16 | t.dtype.lanes, seen.dims = t.dims;
        for (int i = 0; i < MOST_DIMS; ++i) seen.shape[i] = i < t.dims ? t.shape[i] : 0, seen.strides[i] = i < t.dims ? t.strides[i] : 0;
        return true;
    }

    bool by_attributes(PyObject* object, Seen& seen) const {
        const py::handle t(object);
        const py::tuple shape = t.attr("shape"), strides = t.attr("stride")();
        if (shape.size() > MOST_DIMS) return false;
        seen.data = t.attr("data_ptr")().cast<std::uintptr_t>();
        seen.device = t.attr("get_device")().cast<std::int64_t>();
        seen.dtype = (std::int64_t)t.attr("dtype").ptr(), seen.dims = (std::int64_t)shape.size();
        seen.shape = seen.strides = {};
        for (std::size_t i = 0; i < shape.size(); ++i)
            seen.shape[i] = shape[i].cast<std::int64_t>(), seen.strides[i] = strides[i].cast<std::int64_t>();
        return true;
    }

    py::object tensor_, parameter_, grad_enabled_;
    py::str is_neg_{"is_neg"}, requires_grad_{"requires_grad"};
    int (*exchange_)(void*, DLTensor*) = nullptr;
};

inline const Reader& reader() {
    static const Reader* const found = new Reader;  // never freed: Python may be gone by then
    return *found;
}

// ---- structs ---------------------------------------------------------------------------------------------------------

struct Write {  // a field of a struct: of class `target`, or of the planner number -1 - target
    int target;
    std::uint32_t offset, size;
    std::uint64_t value;

    void into(char* image) const { std::memcpy(image + offset, &value, size); }
};

struct Place { int target; std::uint32_t offset; };

// What an argument must be: absent, a tensor like one that was seen, or a number.
struct Argument {
    enum Kind { ABSENT, TENSOR, INT32, FLOAT32 } kind = ABSENT;
    Seen seen;
    std::vector<Place> places;  // of its address or value

    static Argument of(py::handle value, bool is_float, std::vector<Place> places) {
        Argument a;
        if (value.is_none()) return a;
        a.places = std::move(places);
        a.kind = is_float ? FLOAT32 : INT32;
        if (reader().see(value.ptr(), a.seen)) a.kind = TENSOR;
        return a;
    }

    // Whether `object` is such; `value`: what goes to its places.
    bool takes(PyObject* object, bool grad, std::uint64_t& value) const {
        if (kind == ABSENT || object == Py_None) return kind == ABSENT && object == Py_None;
        if (kind == TENSOR) {
            Seen found;
            if (!reader().see(object, found) || !found.like(seen) || (grad && reader().requires_grad(object))) return false;
            value = found.data;
            return true;
        }
        value = 0;
        if (kind == INT32) {
            int overflow = 0;
            const long long number = PyLong_CheckExact(object) ? PyLong_AsLongLongAndOverflow(object, &overflow) : LLONG_MAX;
            if (overflow || number < INT32_MIN || number > INT32_MAX) return false;
            const auto narrow = (std::int32_t)number;
            std::memcpy(&value, &narrow, 4);
            return true;
        }
        if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) return false;
        const double number = PyFloat_AsDouble(object);
        if (PyErr_Occurred()) {
            PyErr_Clear();
            return false;
        }
        if (std::fabs(number) > std::numeric_limits<float>::max() && !std::isinf(number)) return false;
        const auto narrow = (float)number;
        std::memcpy(&value, &narrow, 4);
        return true;
    }
    std::uint32_t size() const { return kind == TENSOR ? 8 : 4; }
};

// A kernel and its parameter struct.
struct Launch {
    py::object kernel;
    driver::CudaKernel* native = nullptr;  // of ours; tests have others
    std::string image;
    unsigned blocks = 0;

    Launch() = default;
    Launch(py::object kernel_, std::string image_, unsigned blocks_) : kernel(std::move(kernel_)), image(std::move(image_)), blocks(blocks_) {
        if (py::isinstance<driver::CudaKernel>(kernel)) native = kernel.cast<driver::CudaKernel*>();
    }
    void operator()(std::uintptr_t stream) {
        if (native)
            native->launch(image.data(), blocks, 1, stream);
        else
            kernel.attr("launch")(py::reinterpret_steal<py::object>(PyByteArray_FromStringAndSize(image.data(), (Py_ssize_t)image.size())), blocks, 1, stream);
    }
    template <typename T> void put(std::uint32_t offset, const T& value) { std::memcpy(image.data() + offset, &value, sizeof value); }
};

// ---- calls -----------------------------------------------------------------------------------------------------------

struct PlanCall {
    std::vector<Argument> arguments;  // plan's tensors, then the parameters
    py::tuple options;
    std::vector<Launch> planners;     // in the order in which they are launched
    std::vector<Write> writes;        // for the classes
    std::vector<int> active;
    std::int64_t rows, requests;
    py::object result;
};

struct ClassRun {
    int target;
    Launch launch;
    std::int64_t ran_at, maps_at;  // offsets in the struct; maps_at < 0: no tensor maps
    py::object maps;               // their 384 bytes, by the addresses of q, k and v
    std::map<std::array<std::uintptr_t, 3>, std::string> known;
    std::uint64_t plan = 0;        // whose fields the struct has
};

struct RunCall {
    Seen q, k, v, out;
    bool one, has_out, return_lse, partial;
    bool like_q;  // the output is allocated as q is, which costs less to say
    std::vector<Argument> params;
    py::object out_shape, lse_shape, out_dtype;
    std::int64_t second, q_extent, k_extent, v_extent, out_bytes, num_pages, requests;  // requests < 0: any number
    std::vector<ClassRun> classes;
};

// Of one BatchAttention. A plan is that of the workspace at `base` until another one claims it.
class Calls {
  public:
    Calls(std::uintptr_t base, int device_index, py::object device, py::object stream, py::tuple plan_names, py::tuple run_names,
          py::dict defaults, std::uintptr_t alignment)
        : owner_(&owners()[base]), index_(py::int_(device_index)), device_(std::move(device)), stream_(std::move(stream)),
          plan_names_(std::move(plan_names)), run_names_(std::move(run_names)), defaults_(std::move(defaults)), alignment_(alignment) {
        const py::module_ torch = py::module_::import("torch");
        empty_ = torch.attr("empty"), empty_like_ = torch.attr("empty_like"), float32_ = torch.attr("float32"), empty_names_ = py::make_tuple("dtype", "device");
    }

    // ---- plans
    void claim() { plan_ = *owner_ = ++last_plan(), known_ = false; }
    bool owns() const { return plan_ != 0 && *owner_ == plan_; }

    // What the plan that Python has made writes into the structs of classes.
    void planned(std::vector<Write> writes, std::vector<int> active, std::int64_t rows, std::int64_t requests, std::int64_t top_page, py::object held) {
        writes_ = std::move(writes), active_ = std::move(active), rows_ = rows, requests_ = requests, top_page_ = top_page;
        held_ = std::move(held), ran_ = false, known_ = true;
    }

    void add_plan(py::tuple given, py::tuple options, py::tuple params, std::vector<std::vector<Place>> places, std::vector<bool> floats,
                  const std::vector<std::tuple<py::object, std::string, unsigned>>& planners, std::vector<Write> writes,
                  std::vector<int> active, std::int64_t rows, std::int64_t requests, py::object result) {
        PlanCall call{{}, std::move(options), {}, std::move(writes), std::move(active), rows, requests, std::move(result)};
        for (const auto& [kernel, image, blocks] : planners) call.planners.emplace_back(kernel, image, blocks);
        for (std::size_t i = 0; i < given.size() + params.size(); ++i)
            call.arguments.push_back(Argument::of(i < given.size() ? given[i] : params[i - given.size()], floats[i], places[i]));
        keep(plans_, std::move(call));
    }

    // A plan like a known one: what was given with it as its result. None: it is not.
    py::object plan(py::tuple given, py::tuple options, py::dict params) {
        known_ = false;  // nor will there be a plan if this one fails
        if (plans_.empty()) return py::none();
        std::array<PyObject*, MOST_ARGUMENTS> objects;
        const std::size_t count = gather(given, params, plan_names_, objects);
        const bool grad = count > given.size() && reader().grad_enabled();
        std::array<std::uint64_t, MOST_ARGUMENTS> values;
        PlanCall* const call = first(plans_, [&](const PlanCall& c) {
            if (c.arguments.size() != count || !c.options.equal(options)) return false;
            for (std::size_t i = 0; i < count; ++i)
                if (!c.arguments[i].takes(objects[i], grad, values[i])) return false;
            return true;
        });
        if (!call) return py::none();
        claim();
        writes_ = call->writes;
        for (std::size_t i = 0; i < count; ++i)
            for (const Place& place : call->arguments[i].places) {
                const Write write{place.target, place.offset, call->arguments[i].size(), values[i]};
                if (place.target < 0)
                    write.into(call->planners[-1 - place.target].image.data());
                else
                    writes_.push_back(write);
            }
        const std::uintptr_t on = stream();
        for (Launch& planner : call->planners) planner(on);
        active_ = call->active, rows_ = call->rows, requests_ = call->requests, top_page_ = -1;
        py::tuple bound(count - given.size());
        for (std::size_t i = given.size(); i < count; ++i) bound[i - given.size()] = py::reinterpret_borrow<py::object>(objects[i]);
        held_ = py::make_tuple(given, bound), ran_ = false, known_ = true;
        return call->result;
    }

    py::object held() const { return held_; }  // what the plan was given, as plan holds it: its tensors, its parameters
    bool ran() const { return ran_; }
    void set_ran() { ran_ = true; }

    // ---- runs
    void add_run(py::handle q, py::handle kv, py::handle out, bool return_lse, bool partial, py::tuple params,
                 std::vector<std::vector<Place>> places, std::vector<bool> floats, py::object out_shape, py::object lse_shape,
                 py::object out_dtype, std::int64_t second, std::array<std::int64_t, 4> bytes, std::int64_t num_pages, std::int64_t requests,
                 py::list classes) {
        RunCall call{};
        call.one = !PyTuple_Check(kv.ptr()), call.has_out = !out.is_none(), call.return_lse = return_lse, call.partial = partial;
        const py::handle k = call.one ? kv : py::handle(PyTuple_GET_ITEM(kv.ptr(), 0));
        if (!reader().see(q.ptr(), call.q) || !reader().see(k.ptr(), call.k)) return;
        if (!call.one && !reader().see(PyTuple_GET_ITEM(kv.ptr(), 1), call.v)) return;
        if (call.has_out && !reader().see(out.ptr(), call.out)) return;
        for (std::size_t i = 0; i < params.size(); ++i) call.params.push_back(Argument::of(params[i], floats[i], places[i]));
        call.out_shape = std::move(out_shape), call.lse_shape = std::move(lse_shape), call.out_dtype = std::move(out_dtype);
        call.second = second, call.q_extent = bytes[0], call.k_extent = bytes[1], call.v_extent = bytes[2], call.out_bytes = bytes[3];
        call.num_pages = num_pages, call.requests = requests;
        call.like_q = !call.partial && py::handle(q).attr("is_contiguous")().cast<bool>() && py::tuple(q.attr("shape")).equal(call.out_shape);
        for (const py::handle item : classes) {
            const auto [target, kernel, image, blocks, ran_at, maps_at, maps] =
                item.cast<std::tuple<int, py::object, std::string, unsigned, std::int64_t, std::int64_t, py::object>>();
            call.classes.push_back({target, Launch(kernel, image, blocks), ran_at, maps_at, maps, {}, 0});
        }
        keep(runs_, std::move(call));
    }

    // A run like a known one, of the plan that is there: its result. None: it is not.
    py::object run(py::handle q, py::handle kv, py::handle out, bool return_lse, bool partial, py::dict params) {
        if (runs_.empty() || !known_ || !owns()) return py::none();
        const bool one = !PyTuple_CheckExact(kv.ptr()), has_out = !out.is_none();
        if (!one && PyTuple_GET_SIZE(kv.ptr()) != 2) return py::none();
        PyObject *const k = one ? kv.ptr() : PyTuple_GET_ITEM(kv.ptr(), 0), *const v = one ? k : PyTuple_GET_ITEM(kv.ptr(), 1);
        Seen q_seen, k_seen, v_seen, out_seen;
        if (!reader().see(q.ptr(), q_seen) || !reader().see(k, k_seen)) return py::none();
        if ((!one && !reader().see(v, v_seen)) || (has_out && !reader().see(out.ptr(), out_seen))) return py::none();
        const bool grad = reader().grad_enabled();
        if (grad)
            for (PyObject* tensor : {q.ptr(), k, v, has_out ? out.ptr() : k})
                if (reader().requires_grad(tensor)) return py::none();
        std::array<PyObject*, MOST_ARGUMENTS> objects;
        const std::size_t count = gather(py::tuple(), params, run_names_, objects);
        std::array<std::uint64_t, MOST_ARGUMENTS> values;
        RunCall* const call = first(runs_, [&](const RunCall& c) {
            if (c.one != one || c.has_out != has_out || c.return_lse != return_lse || c.partial != partial) return false;
            if (!c.q.like(q_seen) || !c.k.like(k_seen) || (!one && !c.v.like(v_seen)) || (has_out && !c.out.like(out_seen))) return false;
            if ((c.requests >= 0 && c.requests != requests_) || c.params.size() != count) return false;
            for (const int target : active_)
                if (std::none_of(c.classes.begin(), c.classes.end(), [&](const ClassRun& known) { return known.target == target; })) return false;
            for (std::size_t i = 0; i < count; ++i)
                if (!c.params[i].takes(objects[i], grad, values[i])) return false;
            return true;
        });
        if (!call || call->q.shape[0] < rows_ || top_page_ >= call->num_pages) return py::none();
        const std::uintptr_t q_at = q_seen.data, k_at = k_seen.data, v_at = one ? k_at + call->second : v_seen.data;
        if ((q_at | k_at | v_at | out_seen.data) % alignment_) return py::none();

        py::object result = py::reinterpret_borrow<py::object>(out), lse;
        std::uintptr_t out_at = out_seen.data, lse_at = 0;
        if (has_out) {
            const auto overlaps = [&](std::uintptr_t at, std::int64_t bytes) { return at < out_at + call->out_bytes && out_at < at + bytes; };
            if (overlaps(q_at, call->q_extent) || overlaps(k_at, call->k_extent) || overlaps(v_at, call->v_extent)) return py::none();
        } else {
            result = call->like_q ? like(q) : allocate(call->out_shape, call->out_dtype);
            if (!reader().see(result.ptr(), out_seen)) return py::none();
            out_at = out_seen.data;
        }
        if (!call->lse_shape.is_none()) {
            Seen seen;
            lse = allocate(call->lse_shape, float32_);
            if (!reader().see(lse.ptr(), seen)) return py::none();
            lse_at = seen.data;
        }
        const std::uintptr_t on = active_.empty() ? 0 : stream(), addresses[] = {q_at, k_at, v_at, out_at, lse_at};
        for (const int target : active_)
            for (ClassRun& c : call->classes)
                if (c.target == target) {
                    if (c.plan != plan_) {
                        for (const Write& write : writes_)
                            if (write.target == target) write.into(c.launch.image.data());
                        c.plan = plan_;
                    }
                    std::memcpy(c.launch.image.data(), addresses, sizeof addresses);
                    c.launch.put(c.ran_at, (std::int32_t)ran_);
                    for (std::size_t i = 0; i < count; ++i)
                        for (const Place& place : call->params[i].places)
                            if (place.target == target) Write{target, place.offset, call->params[i].size(), values[i]}.into(c.launch.image.data());
                    if (c.maps_at >= 0) {
                        const std::string& maps = maps_of(c, {q_at, k_at, v_at});
                        std::memcpy(c.launch.image.data() + c.maps_at, maps.data(), maps.size());
                    }
                    c.launch(on);
                }
        ran_ = true;
        if (!return_lse && !partial) return result;
        return py::make_tuple(std::move(result), lse ? std::move(lse) : py::object(py::none()));
    }

  private:
    static constexpr std::size_t MOST_ARGUMENTS = 64, MOST_CALLS = 256, MOST_MAPS = 4096;

    static std::unordered_map<std::uintptr_t, std::uint64_t>& owners() {  // the last plan, by a workspace's address
        static auto* const found = new std::unordered_map<std::uintptr_t, std::uint64_t>;
        return *found;
    }
    static std::uint64_t& last_plan() {
        static std::uint64_t last = 0;
        return last;
    }

    template <typename Call> static void keep(std::deque<Call>& calls, Call call) {
        if (calls.size() >= MOST_CALLS) calls.pop_back();
        calls.push_front(std::move(call));
    }
    template <typename Call, typename Fits> static Call* first(std::deque<Call>& calls, const Fits& fits) {
        for (Call& call : calls)
            if (fits(call)) return &call;
        return nullptr;
    }

    // The arguments and then the parameters, given or the variant's own; none for a parameter that is unknown.
    static constexpr std::size_t UNKNOWN = ~std::size_t{0};
    std::size_t gather(const py::tuple& given, const py::dict& params, const py::tuple& names, std::array<PyObject*, MOST_ARGUMENTS>& objects) const {
        std::size_t count = 0, found = 0;
        if (given.size() + names.size() > MOST_ARGUMENTS) return UNKNOWN;
        for (const py::handle x : given) objects[count++] = x.ptr();
        for (const py::handle name : names) {
            PyObject* value = PyDict_GetItemWithError(params.ptr(), name.ptr());
            found += value != nullptr;
            if (!value || value == Py_None) value = PyDict_GetItemWithError(defaults_.ptr(), name.ptr());
            objects[count++] = value ? value : Py_None;
        }
        return found == params.size() ? count : UNKNOWN;
    }

    std::uintptr_t stream() const {
        const auto found = py::reinterpret_steal<py::object>(PyObject_CallOneArg(stream_.ptr(), index_.ptr()));
        if (!found) throw py::error_already_set();
        return (std::uintptr_t)PyLong_AsUnsignedLongLong(found.ptr());
    }

    py::object allocate(const py::object& shape, const py::object& dtype) const {
        PyObject* const arguments[] = {shape.ptr(), dtype.ptr(), device_.ptr()};
        PyObject* const made = PyObject_Vectorcall(empty_.ptr(), arguments, 1, empty_names_.ptr());
        if (!made) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(made);
    }

    py::object like(py::handle tensor) const {
        PyObject* const made = PyObject_CallOneArg(empty_like_.ptr(), tensor.ptr());
        if (!made) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(made);
    }

    static const std::string& maps_of(ClassRun& c, std::array<std::uintptr_t, 3> at) {
        auto found = c.known.find(at);
        if (found == c.known.end()) {
            if (c.known.size() >= MOST_MAPS) c.known.clear();
            found = c.known.emplace(at, c.maps(at[0], at[1], at[2]).cast<std::string>()).first;
        }
        return found->second;
    }

    std::uint64_t* owner_;
    std::uint64_t plan_ = 0;  // a number of its own
    py::object index_, device_, stream_, empty_, empty_like_, float32_, empty_names_;
    py::tuple plan_names_, run_names_;
    py::dict defaults_;
    std::uintptr_t alignment_;

    std::vector<Write> writes_;
    std::vector<int> active_;
    std::int64_t rows_ = 0, requests_ = 0, top_page_ = -1;
    bool ran_ = false, known_ = false;
    py::object held_ = py::none();

    std::deque<PlanCall> plans_;
    std::deque<RunCall> runs_;
};

inline void bind(py::module_& m) {
    py::class_<Write>(m, "Write").def(py::init([](int target, std::uint32_t offset, const std::string& field) {
        Write write{target, offset, (std::uint32_t)field.size(), 0};
        if (field.size() > 8) throw std::invalid_argument("a field of more than 8 bytes");
        std::memcpy(&write.value, field.data(), field.size());
        return write;
    }));
    py::class_<Place>(m, "Place").def(py::init([](int target, std::uint32_t offset) { return Place{target, offset}; }));
    py::class_<Calls>(m, "Calls")
        .def(py::init<std::uintptr_t, int, py::object, py::object, py::tuple, py::tuple, py::dict, std::uintptr_t>())
        .def("claim", &Calls::claim)
        .def("owns", &Calls::owns)
        .def("planned", &Calls::planned)
        .def("add_plan", &Calls::add_plan)
        .def("plan", &Calls::plan)
        .def_property_readonly("held", &Calls::held)
        .def_property_readonly("ran", &Calls::ran)
        .def("set_ran", &Calls::set_ran)
        .def("add_run", &Calls::add_run)
        .def("run", &Calls::run);
}

}  // namespace calls
