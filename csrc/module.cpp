// Python's view: `_cpu.run(isa, arguments)` with pointers and strides as integers.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <cstring>

#include "mogu.h"

using namespace mogu;

namespace {

struct Isa {
  const char* name;
  Run run;
  bool here;
};

const Isa* isas() {
  static const Isa table[] = {
#if defined(__x86_64__)
      {"avx512bf16", run_avx512bf16,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16")},
      {"avx512", run_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
      {"avx2", run_avx2,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c")},
#endif
      {"portable", run_portable, true},
      {nullptr, nullptr, false},
  };
  return table;
}

// Walks a tuple of integers; floats where asked for.
struct Reader {
  PyObject* tuple;
  Py_ssize_t at = 0;

  PyObject* next() {  // None, which is no number, beyond the end
    return at < PyTuple_Size(tuple) ? PyTuple_GetItem(tuple, at++) : (++at, Py_None);
  }
  int64_t integer() { return PyLong_AsLongLong(next()); }
  double real() { return PyFloat_AsDouble(next()); }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(integer()));
  }
};

PyObject* run(PyObject*, PyObject* args) {
  const char* name;
  PyObject* tuple;
  if (!PyArg_ParseTuple(args, "sO!", &name, &PyTuple_Type, &tuple)) return nullptr;
  const Isa* isa = isas();
  while (isa->name && std::strcmp(isa->name, name)) ++isa;
  if (!isa->name || !isa->here)
    return PyErr_Format(PyExc_ValueError, "isa='%s': this processor does not have it", name);
  Reader in{tuple};
  Call call{};
  Dtype dtype = static_cast<Dtype>(in.integer());
  call.activation = static_cast<Activation>(in.integer());
  call.softmax = in.integer();
  call.threads = in.integer();
  call.most_tiled = in.integer();
  call.M = in.integer(), call.N = in.integer(), call.K = in.integer();
  call.E = in.integer(), call.rank = in.integer();
  call.x = in.pointer<const void>(), call.x_m = in.integer();
  call.routed = in.pointer<const bool>(), call.routed_m = in.integer();
  call.y = in.pointer<void>(), call.y_m = in.integer();
  for (int64_t e = 0; e < call.E && e < MAX_EXPERTS; ++e) call.scaling[e] = in.real();
  int projections = call.activation == Activation::none ? 1 : 2;
  for (int j = 0; j < projections; ++j) {
    Projection& p = call.projections[j];
    p.weight = in.pointer<const void>(), p.weight_n = in.integer();
    p.bias = in.pointer<const void>(), p.bias_n = in.integer();
    p.lora_A = in.pointer<const void>(), p.lora_A_e = in.integer(), p.lora_A_r = in.integer();
    p.lora_B = in.pointer<const void>();
    p.lora_B_e = in.integer(), p.lora_B_n = in.integer(), p.lora_B_r = in.integer();
    p.gate_weight = in.pointer<const float>(), p.gate_weight_e = in.integer();
    p.gate_bias = in.pointer<const float>(), p.gate_bias_e = in.integer();
    p.gates = in.pointer<float>();
  }
  if (in.at != PyTuple_Size(tuple))
    return PyErr_Format(PyExc_TypeError, "%zd arguments, not %zd", PyTuple_Size(tuple), in.at);
  if (PyErr_Occurred()) return nullptr;
  PyThreadState* state = PyEval_SaveThread();
  isa->run(call, dtype);
  PyEval_RestoreThread(state);
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
    {"run", run, METH_VARARGS, "run(isa, arguments): one call, arguments as csrc/mogu.h has them."},
    {"available", available, METH_NOARGS, "Instruction sets of this processor, best first."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", "The CPU backend.", 0, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&definition); }
