// Python's view of the backend: three calls that take tensors. Each answers None where the operands
// are not what the kernels take as they are; the caller then says why, or makes copies that are.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "tensors.h"

using namespace mogu;

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool here;
};

const Isa* isas() {
  static const Isa table[] = {
#if defined(__x86_64__)
      {"avx512bf16", &avx512bf16_kernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16")},
      {"avx512", &avx512_kernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
      {"avx2", &avx2_kernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c")},
#endif
      {"portable", &portable_kernels, true},
      {nullptr, nullptr, false},
  };
  return table;
}

const ExchangeApi* exchange = nullptr;
PyObject* plain_types = nullptr;  // (torch.Tensor, torch.nn.Parameter)

// Whether the object is a tensor and nothing more: a subclass may have no memory of its own.
bool is_plain(PyObject* object) {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == PyTuple_GetItem(plain_types, 0) || type == PyTuple_GetItem(plain_types, 1);
}

// Null, with an exception, for a name that is not here; the best for a null name.
const Kernels* kernels_of(const char* name) {
  const Isa* isa = isas();
  while (isa->name && (name ? std::strcmp(isa->name, name) != 0 : !isa->here)) ++isa;
  if (isa->name && isa->here && exchange) return isa->kernels;
  PyErr_Format(PyExc_ValueError, "isa='%s': this processor does not have it", name ? name : "");
  return nullptr;
}

// Turns an answer into the next: `fits` is false from the first thing that does not fit on.
struct Reader {
  bool fits = true;

  void expect(bool condition) { fits = fits && condition; }

  View tensor(PyObject* object) {
    View view;
    if (!fits || !is_plain(object) || exchange->read(object, &view.t) != 0) {
      PyErr_Clear();
      fits = false;
    }
    fits = fits && (view.t.data || view.is_empty());
    return view;
  }

  // x [M, K]: what says which dtype the others have
  View tokens(PyObject* object, Dtype& dtype) {
    View x = tensor(object);
    expect(fits && x.t.device_type == ON_CPU && x.t.ndim == 2 && x.rows_are_contiguous());
    dtype = x.is(BFLOAT, 16) ? Dtype::bf16 : x.is(FLOAT, 16) ? Dtype::f16 : Dtype::f32;
    expect(fits && x.is(dtype));
    return x;
  }

  View like(PyObject* object, Dtype dtype, std::initializer_list<int64_t> sizes) {
    View view = tensor(object);
    expect(fits && view.is(dtype) && view.has(sizes));
    return view;
  }

  int64_t choice(PyObject* object, std::initializer_list<const char*> names) {
    int64_t at = 0;
    if (PyUnicode_Check(object))
      for (const char* name : names) {
        if (PyUnicode_CompareWithASCIIString(object, name) == 0) return at;
        ++at;
      }
    fits = false;
    return 0;
  }

  // one number for all experts, or one each
  void scaling(PyObject* object, Call& call) {
    bool one = PyFloat_Check(object) || PyLong_Check(object);
    expect(one || (PySequence_Check(object) && PySequence_Size(object) == call.E));
    for (int64_t e = 0; fits && e < call.E; ++e) {
      PyObject* item = one ? Py_NewRef(object) : PySequence_GetItem(object, e);
      double number = item ? PyFloat_AsDouble(item) : -1;
      Py_XDECREF(item);
      if (PyErr_Occurred()) {
        PyErr_Clear();
        fits = false;
      }
      call.scaling[e] = float(number);
    }
  }

  // x, sizes of the experts, scaling, gate and mask of a call
  Dtype common(PyObject* x_object, PyObject* lora_A, PyObject* scales, PyObject* gate,
               PyObject* routed, Call& call) {
    Dtype dtype;
    View x = tokens(x_object, dtype), A = tensor(lora_A);
    expect(fits && A.t.ndim == 3);
    if (!fits) return dtype;
    call.x = x.data(), call.x_m = x.stride(0);
    call.M = x.size(0), call.K = x.size(1);
    call.E = A.size(0), call.rank = A.size(1);
    expect(1 <= call.E && call.E <= MAX_EXPERTS && 1 <= call.rank);
    scaling(scales, call);
    call.softmax = choice(gate, {"sigmoid", "softmax"}) == 1;
    if (routed != Py_None) {
      View mask = tensor(routed);
      expect(fits && mask.is(BOOL, 8) && mask.has({call.M}));
      if (fits) call.routed = mask.data<bool>(), call.routed_m = mask.stride(0);
    }
    return dtype;
  }

  void experts(PyObject* lora_A, PyObject* gate_weight, PyObject* gate_bias, Dtype dtype,
               const Call& call, Projection& p) {
    View A = like(lora_A, dtype, {call.E, call.rank, call.K});
    View u = like(gate_weight, Dtype::f32, {call.E, call.K});
    View c = like(gate_bias, Dtype::f32, {call.E});
    expect(fits && A.rows_are_contiguous() && u.rows_are_contiguous());
    if (!fits) return;
    p.lora_A = A.data(), p.lora_A_e = A.stride(0), p.lora_A_r = A.stride(1);
    p.gate_weight = u.data<float>(), p.gate_weight_e = u.stride(0);
    p.gate_bias = c.data<float>(), p.gate_bias_e = c.stride(0);
  }

  void base(PyObject* weight, PyObject* bias, PyObject* lora_B, Dtype dtype, const Call& call,
            Projection& p) {
    View W = like(weight, dtype, {call.N, call.K}), B = like(lora_B, dtype, {call.E, call.N, call.rank});
    expect(fits && W.rows_are_contiguous());
    if (fits && bias != Py_None) {
      View b = like(bias, dtype, {call.N});
      if (fits) p.bias = b.data(), p.bias_n = b.stride(0);
    }
    if (!fits) return;
    p.weight = W.data(), p.weight_n = W.stride(0);
    p.lora_B = B.data();
    p.lora_B_e = B.stride(0), p.lora_B_n = B.stride(1), p.lora_B_r = B.stride(2);
  }
};

// A new tensor of dtype and device of `like`; null with an exception.
PyObject* empty(PyObject* like, std::initializer_list<int64_t> sizes, View& view) {
  PyObject* shape = PyTuple_New(sizes.size());
  Py_ssize_t axis = 0;
  for (int64_t size : sizes)
    if (shape) PyTuple_SetItem(shape, axis++, PyLong_FromLongLong(size));
  PyObject* tensor = shape ? PyObject_CallMethod(like, "new_empty", "(O)", shape) : nullptr;
  Py_XDECREF(shape);
  if (tensor && (!is_plain(tensor) || exchange->read(tensor, &view.t) != 0)) Py_CLEAR(tensor);
  if (!tensor && !PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "new_empty made no tensor");
  return tensor;
}

// Runs without the GIL; false with an exception.
template <class Arguments>
bool run(bool (*kernel)(const Arguments&, Dtype), const Arguments& call, Dtype dtype) {
  PyThreadState* state = PyEval_SaveThread();
  bool done = kernel(call, dtype);
  PyEval_RestoreThread(state);
  if (!done) PyErr_SetString(PyExc_MemoryError, "the CPU backend found no memory for its work space");
  return done;
}

// project(isa, x, projections, activation, scaling, gate, routed, return_gates, threads, most_tiled)
//   -> (y, gates [P, M, E] or None)
// where a projection is (weight, bias, lora_A, lora_B, gate_weight, gate_bias).
PyObject* project(PyObject*, PyObject* args) {
  const char* name;
  PyObject *x, *projections, *activation, *scaling, *gate, *routed;
  int return_gates;
  long long threads, most_tiled;
  if (!PyArg_ParseTuple(args, "zOO!OOOOpLL", &name, &x, &PyTuple_Type, &projections, &activation,
                        &scaling, &gate, &routed, &return_gates, &threads, &most_tiled))
    return nullptr;
  const Kernels* kernels = kernels_of(name);
  if (!kernels) return nullptr;
  Call call{};
  Reader in;
  call.threads = threads, call.most_tiled = most_tiled;
  if (activation != Py_None)
    call.activation = static_cast<Activation>(1 + in.choice(activation, {"silu", "gelu", "gelu_tanh"}));
  Py_ssize_t count = call.activation == Activation::none ? 1 : 2;
  PyObject* operands[2][6];
  in.expect(PyTuple_Size(projections) == count);
  for (Py_ssize_t j = 0; in.fits && j < count; ++j) {
    PyObject* projection = PyTuple_GetItem(projections, j);
    in.expect(PyTuple_Check(projection) && PyTuple_Size(projection) == 6);
    for (Py_ssize_t i = 0; in.fits && i < 6; ++i) operands[j][i] = PyTuple_GetItem(projection, i);
  }
  if (!in.fits) Py_RETURN_NONE;
  Dtype dtype = in.common(x, operands[0][2], scaling, gate, routed, call);
  View weight = in.tensor(operands[0][0]);
  in.expect(in.fits && weight.t.ndim == 2);
  if (!in.fits) Py_RETURN_NONE;
  call.N = weight.size(0);
  for (Py_ssize_t j = 0; j < count; ++j) {
    auto [W, bias, A, B, u, c] = operands[j];
    in.base(W, bias, B, dtype, call, call.projections[j]);
    in.experts(A, u, c, dtype, call, call.projections[j]);
  }
  if (!in.fits) Py_RETURN_NONE;
  View y_view, gates_view;
  PyObject* y = empty(x, {call.M, call.N}, y_view);
  PyObject* gates = !y             ? nullptr
                    : return_gates ? empty(operands[0][5], {count, call.M, call.E}, gates_view)
                                   : Py_NewRef(Py_None);
  if (gates) {
    call.y = y_view.data(), call.y_m = call.N;
    for (Py_ssize_t j = 0; return_gates && j < count; ++j)
      call.projections[j].gates = gates_view.data<float>() + j * call.M * call.E;
    if (call.M == 0 || run(kernels->project, call, dtype)) return Py_BuildValue("(NN)", y, gates);
  }
  Py_XDECREF(y);
  Py_XDECREF(gates);
  return nullptr;
}

// shrink(isa, x, lora_A, gate_weight, gate_bias, scaling, gate, routed, threads, most_tiled)
//   -> (shrunk [M, E * rank], total [M], gates [M, E])
PyObject* shrink(PyObject*, PyObject* args) {
  const char* name;
  PyObject *x, *lora_A, *gate_weight, *gate_bias, *scaling, *gate, *routed;
  long long threads, most_tiled;
  if (!PyArg_ParseTuple(args, "zOOOOOOOLL", &name, &x, &lora_A, &gate_weight, &gate_bias, &scaling,
                        &gate, &routed, &threads, &most_tiled))
    return nullptr;
  const Kernels* kernels = kernels_of(name);
  if (!kernels) return nullptr;
  Call call{};
  Reader in;
  call.threads = threads, call.most_tiled = most_tiled;
  Dtype dtype = in.common(x, lora_A, scaling, gate, routed, call);
  Projection& p = call.projections[0];
  if (in.fits) in.experts(lora_A, gate_weight, gate_bias, dtype, call, p);
  if (!in.fits) Py_RETURN_NONE;
  View views[3];
  PyObject* shrunk = empty(x, {call.M, call.E * call.rank}, views[0]);
  PyObject* total = shrunk ? empty(gate_bias, {call.M}, views[1]) : nullptr;
  PyObject* gates = total ? empty(gate_bias, {call.M, call.E}, views[2]) : nullptr;
  if (gates) {
    p.shrunk = views[0].data(), p.total = views[1].data<float>(), p.gates = views[2].data<float>();
    if (call.M == 0 || run(kernels->shrink, call, dtype))
      return Py_BuildValue("(NNN)", shrunk, total, gates);
  }
  Py_XDECREF(shrunk);
  Py_XDECREF(total);
  Py_XDECREF(gates);
  return nullptr;
}

// expand(isa, y, shrunk, total, lora_B, bias, threads) -> y, changed
PyObject* expand(PyObject*, PyObject* args) {
  const char* name;
  PyObject *y_object, *shrunk_object, *total_object, *lora_B, *bias;
  long long threads;
  if (!PyArg_ParseTuple(args, "zOOOOOL", &name, &y_object, &shrunk_object, &total_object, &lora_B,
                        &bias, &threads))
    return nullptr;
  const Kernels* kernels = kernels_of(name);
  if (!kernels) return nullptr;
  Expansion call{};
  Reader in;
  Dtype dtype;
  View y = in.tokens(y_object, dtype), B = in.tensor(lora_B);
  in.expect(in.fits && B.t.ndim == 3);
  if (!in.fits) Py_RETURN_NONE;
  call.threads = threads;
  call.M = y.size(0), call.N = y.size(1), call.E = B.size(0), call.rank = B.size(2);
  in.expect(B.is(dtype) && B.has({call.E, call.N, call.rank}) && call.rank >= 1);
  View shrunk = in.like(shrunk_object, dtype, {call.M, call.E * call.rank});
  View total = in.like(total_object, Dtype::f32, {call.M});
  in.expect(in.fits && shrunk.rows_are_contiguous());
  if (in.fits && bias != Py_None) {
    View b = in.like(bias, dtype, {call.N});
    if (in.fits) call.bias = b.data(), call.bias_n = b.stride(0);
  }
  if (!in.fits) Py_RETURN_NONE;
  call.y = y.data(), call.y_m = y.stride(0);
  call.shrunk = shrunk.data(), call.shrunk_m = shrunk.stride(0);
  call.total = total.data<float>(), call.total_m = total.stride(0);
  call.lora_B = B.data();
  call.lora_B_e = B.stride(0), call.lora_B_n = B.stride(1), call.lora_B_r = B.stride(2);
  if (call.M && !run(kernels->expand, call, dtype)) return nullptr;
  return Py_NewRef(y_object);
}

// bind(torch.Tensor, torch.nn.Parameter): before any other call.
PyObject* bind(PyObject*, PyObject* types) {
  if (!PyTuple_Check(types) || PyTuple_Size(types) != 2)
    return PyErr_Format(PyExc_TypeError, "bind takes (Tensor, Parameter)");
  PyObject* capsule =
      PyObject_GetAttrString(PyTuple_GetItem(types, 0), "__dlpack_c_exchange_api__");
  if (!capsule) return nullptr;
  auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (!api) return nullptr;
  if (api->major != 1 || !api->read)
    return PyErr_Format(PyExc_ValueError, "DLPack %u.%u: 1.x is read here", api->major, api->minor);
  plain_types = Py_NewRef(types);
  exchange = api;
  Py_RETURN_NONE;
}

PyObject* available(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Isa* isa = isas(); names && isa->name; ++isa) {
    if (!isa->here) continue;
    PyObject* name = PyUnicode_FromString(isa->name);
    if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyMethodDef methods[] = {
    {"bind", bind, METH_O, "Take (Tensor, Parameter), whose DLPack exchange API is used; call it first."},
    {"available", available, METH_NOARGS, "Instruction sets of this processor, best first."},
    {"project", project, METH_VARARGS, "Routed projections: mogu_linear and gated_mlp."},
    {"shrink", shrink, METH_VARARGS, "shrink_gate of one projection."},
    {"expand", expand, METH_VARARGS, "gated_expand_."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", "The CPU backend.", 0, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&definition); }
