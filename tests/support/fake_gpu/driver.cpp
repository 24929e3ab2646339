// The part of libcuda that Triton calls, for runtime.cpp: modules are loaded and launched, and nothing runs.
#include <cstdlib>

namespace {
const int capability = getenv("FAKE_GPU_CAPABILITY") ? atoi(getenv("FAKE_GPU_CAPABILITY")) : 90;
}

extern "C" {

int cudaLaunchKernelExC(const void *, const void *, void **);  // of runtime.cpp, which counts

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = getenv("FAKE_GPU_COUNT") ? atoi(getenv("FAKE_GPU_COUNT")) : 1, 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
  switch (attribute) {  // the numbers of CUdevice_attribute
    case 1: *value = 1024; break;  // threads per block
    case 8: *value = 49152; break;  // shared memory per block
    case 10: *value = 32; break;  // threads of a warp
    case 12: case 82: *value = 65536; break;  // registers per block and per multiprocessor
    case 13: *value = 1980000; break;  // kHz
    case 16: *value = capability >= 90 ? 132 : 108; break;  // multiprocessors
    case 36: *value = 2619000; break;  // kHz of the memory
    case 37: *value = 5120; break;  // bits of the memory's bus
    case 39: *value = 2048; break;  // threads per multiprocessor
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    case 81: *value = capability >= 90 ? 233472 : 167936; break;  // shared memory per multiprocessor
    case 97: *value = capability >= 90 ? 232448 : 166912; break;  // shared memory per block, if asked for
    default: *value = 0;
  }
  return 0;
}
int cuCtxGetCurrent(void **context) { return *context = (void *)0x11, 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = (void *)0x11, 0; }
int cuDevicePrimaryCtxGetState(int, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
int cuModuleLoadData(void **module, const void *) { return *module = (void *)0x22, 0; }
int cuModuleGetFunction(void **function, void *, const char *) { return *function = (void *)0x33, 0; }
int cuFuncGetAttribute(int *value, int attribute, void *) { return *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0, 0; }
int cuLaunchKernel() { return cudaLaunchKernelExC(nullptr, nullptr, nullptr); }
int cuLaunchKernelEx() { return cudaLaunchKernelExC(nullptr, nullptr, nullptr); }
int cuGetErrorString(int, const char **text) { return *text = "fake", 0; }
int cuGetErrorName(int, const char **name) { return *name = "fake", 0; }
int cuOccupancyMaxActiveClusters(int *clusters) { return *clusters = 1, 0; }
int cuPointerGetAttribute(void *value, int, unsigned long long address) { return *(unsigned long long *)value = address, 0; }
int cuCtxGetLimit() { return 0; }
int cuCtxSetCurrent() { return 0; }
int cuCtxSetLimit() { return 0; }
int cuDeviceGetName() { return 0; }
int cuFuncSetAttribute() { return 0; }
int cuFuncSetCacheConfig() { return 0; }
int cuLaunchCooperativeKernel() { return cudaLaunchKernelExC(nullptr, nullptr, nullptr); }
int cuMemHostGetDevicePointer_v2() { return 0; }
int cuModuleLoad() { return 0; }
int cuModuleLoadDataEx(void **module) { return *module = (void *)0x22, 0; }
int cuModuleUnload() { return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor() { return 0; }
int cuPointerGetAttributes() { return 0; }
int cuStreamGetCtx() { return 0; }
int cuTensorMapEncodeIm2col() { return 0; }
int cuTensorMapEncodeTiled() { return 0; }

}  // extern "C"
