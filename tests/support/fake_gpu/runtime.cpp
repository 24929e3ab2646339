// A CUDA runtime without a GPU, to be preloaded: memory lies on the host, copies are made at once, and kernels do nothing.
//
// torch's own host code runs on it: dispatch, the caching allocator, streams, CUDA graphs, DistributedDataParallel. What
// kernels would have computed is what lay in their memory: mostly zeros, since of the copies to the device only small
// ones are made, such as the sizes by which processes compare their networks. Functions of cuBLAS, cuDNN and NCCL that
// torch calls and that are not defined here succeed and do nothing: fake_gpu.py adds them. Errors that depend on the
// state of the host are imitated: an index of a device that does not exist, launches without threads, and what a stream
// and its events may not do while it is captured.
//
// Environment: FAKE_GPU_COUNT (1), FAKE_GPU_CAPABILITY (90), FAKE_GPU_LOG (a file to which each process appends its
// counts, as a line of JSON, when it ends).
#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <set>

#include "cudnn_version.h"
#include "driver_types.h"

namespace {

typedef void *Handle;
const size_t kCopied = 4096;  // bytes of the largest copy to the device that is made
enum {
  kOutOfMemory = 2,
  kInvalidConfiguration = 9,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kCaptureUnsupported = 900,
  kCaptureMerge = 902,
  kCaptureIsolation = 905,
  kCapturedEvent = 907
};

int variable(const char *name, int otherwise) {
  const char *value = getenv(name);
  return value ? atoi(value) : otherwise;
}
const int devices = variable("FAKE_GPU_COUNT", 1);
const int capability = variable("FAKE_GPU_CAPABILITY", 90);
const int ranks = variable("WORLD_SIZE", 1);
const int rank_of_process = variable("RANK", 0);

thread_local int device = 0;
thread_local int last_error = 0;
std::mutex mutex;
std::map<uintptr_t, size_t> pinned, on_device;  // start of an allocation: bytes
std::map<Handle, unsigned long long> capturing;  // stream: number of the capture that it is part of
std::map<Handle, unsigned long long> recorded;   // event: number of the capture in which it was recorded, or 0
std::set<int> contexts;                          // devices on which this process has a context
std::atomic<long> handles{1}, launches{0}, graph_launches{0}, captures{0}, copies{0}, synchronisations{0},
    event_waits{0}, collectives{0}, captured_collectives{0}, errors{0};

int fail(int error) {
  errors++;
  return last_error = error;
}
template <class T>
int make(T *handle) {
  *handle = (T)(0x1000 + 16 * handles++);
  return 0;
}
bool is_capturing(Handle stream) {
  std::lock_guard<std::mutex> lock(mutex);
  return capturing.count(stream);
}
void use_context() {
  std::lock_guard<std::mutex> lock(mutex);
  contexts.insert(device);
}
int launched() {
  launches++;
  return 0;
}
bool within(const std::map<uintptr_t, size_t> &memory, const void *address) {
  auto next = memory.upper_bound((uintptr_t)address);
  if (next == memory.begin()) return false;
  --next;
  return (uintptr_t)address < next->first + next->second;
}
int begin_capture(Handle stream) {
  std::lock_guard<std::mutex> lock(mutex);
  capturing[stream] = handles++;
  captures++;
  return 0;
}
int collective(Handle stream, const void *from, void *to, size_t elements, int dtype, int parts = 1) {
  static const size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // of each ncclDataType_t
  const size_t size = elements * bytes[dtype];
  collectives++;
  if (is_capturing(stream))
    captured_collectives++;
  else if (from != to)
    for (int part = 0; part < parts; part++) memmove((char *)to + part * size, from, size);
  return 0;
}

struct Report {
  ~Report() {
    const char *path = getenv("FAKE_GPU_LOG");
    FILE *file = path ? fopen(path, "a") : nullptr;
    if (!file) return;
    fprintf(file,
            "{\"rank\": %d, \"launches\": %ld, \"graph_launches\": %ld, \"captures\": %ld, \"copies\": %ld, "
            "\"synchronisations\": %ld, \"event_waits\": %ld, \"collectives\": %ld, \"captured_collectives\": %ld, \"errors\": %ld, "
            "\"contexts\": %zu}\n",
            rank_of_process, launches.load(), graph_launches.load(), captures.load(), copies.load(),
            synchronisations.load(), event_waits.load(), collectives.load(), captured_collectives.load(), errors.load(), contexts.size());
    fclose(file);
  }
} report;

}  // namespace

extern "C" {

// Counts up to now, for a process that measures parts of its work.
void fake_gpu_counts(long *counts) {
  counts[0] = launches, counts[1] = graph_launches, counts[2] = copies, counts[3] = synchronisations;
}

// --- devices ---------------------------------------------------------------------------------------------------------

int cudaGetDeviceCount(int *count) { return (*count = devices) ? 0 : fail(kNoDevice); }
int cudaGetDevice(int *index) { return *index = device, 0; }
int cudaSetDevice(int index) {
  if (index < 0 || index >= devices) return fail(kInvalidDevice);
  device = index;
  use_context();
  return 0;
}
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }
const char *cudaGetErrorName(int error) { return error ? "fakeGpuError" : "cudaSuccess"; }
const char *cudaGetErrorString(int error) {
  switch (error) {
    case 0: return "no error";
    case kOutOfMemory: return "out of memory";
    case kInvalidConfiguration: return "invalid configuration argument";
    case kNoDevice: return "no CUDA-capable device is detected";
    case kInvalidDevice: return "invalid device ordinal";
    case kCaptureUnsupported: return "operation not permitted when stream is capturing";
    case kCaptureMerge: return "operation would result in a merge of separate capture sequences";
    case kCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case kCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    default: return "unknown error";
  }
}
int cudaPeekAtLastError() { return last_error; }
int cudaGetLastError() {
  int error = last_error;
  last_error = 0;
  return error;
}
int cudaGetDeviceProperties(cudaDeviceProp *properties, int index) {
  if (index < 0 || index >= devices) return fail(kInvalidDevice);
  cudaDeviceProp &p = *properties;
  memset(&p, 0, sizeof p);
  snprintf(p.name, sizeof p.name, "fake GPU sm_%d", capability);
  p.major = capability / 10, p.minor = capability % 10;
  p.totalGlobalMem = size_t(80) << 30, p.l2CacheSize = 50 << 20, p.memoryBusWidth = 5120;
  p.multiProcessorCount = capability >= 90 ? 132 : capability >= 80 ? 108 : 40;
  p.warpSize = 32, p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiProcessor = capability == 75 ? 1024 : 2048;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024, p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 2147483647, p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.sharedMemPerBlock = 49152;
  p.sharedMemPerBlockOptin = capability >= 90 ? 232448 : capability >= 80 ? 166912 : 65536;
  p.sharedMemPerMultiprocessor = capability >= 90 ? 233472 : capability >= 80 ? 167936 : 65536;
  p.textureAlignment = 512, p.pciBusID = index, p.asyncEngineCount = 3;
  p.unifiedAddressing = p.concurrentKernels = p.cooperativeLaunch = p.canMapHostMemory = 1;
  return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int index) {
  cudaDeviceProp p;
  if (int error = cudaGetDeviceProperties(&p, index)) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: *value = p.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimY: *value = p.maxThreadsDim[1]; break;
    case cudaDevAttrMaxBlockDimZ: *value = p.maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[2]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerMultiprocessor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: *value = 0;
  }
  return 0;
}
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }
int cudaDeviceCanAccessPeer(int *can, int, int) { return *can = 1, 0; }
int cudaDeviceGetPCIBusId(char *id, int bytes, int index) { return snprintf(id, bytes, "0000:%02d:00.0", index), 0; }
int cudaDeviceSynchronize() { return synchronisations++, 0; }

// --- memory ----------------------------------------------------------------------------------------------------------

static int allocate(std::map<uintptr_t, size_t> &memory, void **address, size_t bytes) {
  use_context();
  size_t whole = (bytes + 4095) / 4096 * 4096;
  if (!(*address = aligned_alloc(4096, whole ? whole : 4096))) return fail(kOutOfMemory);
  memset(*address, 0, whole);
  std::lock_guard<std::mutex> lock(mutex);
  memory[(uintptr_t)*address] = bytes;
  return 0;
}
static int release(std::map<uintptr_t, size_t> &memory, void *address) {
  std::lock_guard<std::mutex> lock(mutex);
  if (memory.erase((uintptr_t)address)) free(address);
  return 0;
}
int cudaMalloc(void **address, size_t bytes) { return allocate(on_device, address, bytes); }
int cudaFree(void *address) { return release(on_device, address); }
int cudaHostAlloc(void **address, size_t bytes, unsigned) { return allocate(pinned, address, bytes); }
int cudaFreeHost(void *address) { return release(pinned, address); }
int cudaHostRegister(void *address, size_t bytes, unsigned) {
  std::lock_guard<std::mutex> lock(mutex);
  pinned[(uintptr_t)address] = bytes;
  return 0;
}
int cudaHostUnregister(void *address) {
  std::lock_guard<std::mutex> lock(mutex);
  pinned.erase((uintptr_t)address);
  return 0;
}
int cudaMemGetInfo(size_t *unused, size_t *total) { return *total = size_t(80) << 30, *unused = size_t(79) << 30, 0; }
int cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *address) {
  std::lock_guard<std::mutex> lock(mutex);
  memset(attributes, 0, sizeof *attributes);
  bool host = within(pinned, address), accelerator = within(on_device, address);
  attributes->device = device;
  attributes->type = host ? cudaMemoryTypeHost : accelerator ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->devicePointer = host || accelerator ? (void *)address : nullptr;
  attributes->hostPointer = host ? (void *)address : nullptr;
  return 0;
}
static void copy(void *to, const void *from, size_t bytes, int kind) {
  if (kind != cudaMemcpyHostToDevice || bytes <= kCopied) memmove(to, from, bytes);
}
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
  return synchronisations++, copy(to, from, bytes, kind), 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, Handle stream) {
  copies++;
  if (!is_capturing(stream)) copy(to, from, bytes, kind);
  return 0;
}
int cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, Handle) {
  return memmove(to, from, bytes), 0;
}
int cudaMemset(void *address, int value, size_t bytes) { return memset(address, value, bytes), 0; }
int cudaMemsetAsync(void *address, int value, size_t bytes, Handle stream) {
  if (!is_capturing(stream)) memset(address, value, bytes);
  return 0;
}

// --- streams, events and graphs --------------------------------------------------------------------------------------

int cudaStreamCreate(Handle *stream) { return make(stream); }
int cudaStreamCreateWithFlags(Handle *stream, unsigned) { return make(stream); }
int cudaStreamCreateWithPriority(Handle *stream, unsigned, int) { return use_context(), make(stream); }
int cudaStreamGetPriority(Handle, int *priority) { return *priority = 0, 0; }
int cudaStreamSynchronize(Handle stream) {
  synchronisations++;
  return is_capturing(stream) ? fail(kCaptureUnsupported) : 0;
}
int cudaEventCreate(Handle *event) { return make(event); }
int cudaEventCreateWithFlags(Handle *event, unsigned) { return make(event); }
int cudaEventElapsedTime(float *milliseconds, Handle, Handle) { return *milliseconds = 0.01f, 0; }
int cudaEventRecordWithFlags(Handle event, Handle stream, unsigned) {
  std::lock_guard<std::mutex> lock(mutex);
  auto capture = capturing.find(stream);
  recorded[event] = capture == capturing.end() ? 0 : capture->second;
  return 0;
}
int cudaEventRecord(Handle event, Handle stream) { return cudaEventRecordWithFlags(event, stream, 0); }
int cudaEventQuery(Handle event) {
  std::lock_guard<std::mutex> lock(mutex);
  return recorded[event] ? fail(kCapturedEvent) : 0;
}
int cudaEventSynchronize(Handle event) { return event_waits++, cudaEventQuery(event); }
int cudaEventDestroy(Handle event) {
  std::lock_guard<std::mutex> lock(mutex);
  return recorded.erase(event), 0;
}
int cudaStreamWaitEvent(Handle stream, Handle event, unsigned) {
  std::lock_guard<std::mutex> lock(mutex);
  auto made = recorded.find(event);
  if (made == recorded.end()) return 0;
  auto capture = capturing.find(stream);
  if (capture == capturing.end()) {
    if (made->second) capturing[stream] = made->second;  // the stream becomes part of the capture
    return 0;
  }
  return !made->second ? fail(kCaptureIsolation) : made->second == capture->second ? 0 : fail(kCaptureMerge);
}
int cudaLaunchHostFunc(Handle, void (*function)(void *), void *data) { return function(data), 0; }
int cudaStreamAddCallback(Handle stream, void (*function)(Handle, int, void *), void *data, unsigned) {
  return function(stream, 0, data), 0;
}
int cudaStreamBeginCapture(Handle stream, int) { return begin_capture(stream); }
int cudaStreamBeginCaptureToGraph(Handle stream, Handle, const Handle *, const void *, size_t, int) {
  return begin_capture(stream);
}
int cudaStreamEndCapture(Handle stream, Handle *graph) {
  std::lock_guard<std::mutex> lock(mutex);
  const unsigned long long ended = capturing[stream];
  for (auto each = capturing.begin(); each != capturing.end();)
    each = each->second == ended ? capturing.erase(each) : std::next(each);
  return make(graph);
}
int cudaStreamIsCapturing(Handle stream, int *status) { return *status = is_capturing(stream), 0; }
int cudaStreamGetCaptureInfo(Handle stream, int *status, unsigned long long *id, Handle *graph, const void **nodes,
                             const void **edges, size_t *count) {
  std::lock_guard<std::mutex> lock(mutex);
  auto capture = capturing.find(stream);
  if (status) *status = capture != capturing.end();
  if (capture == capturing.end()) return 0;
  if (id) *id = capture->second;
  if (graph) *graph = (Handle)0x10;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return 0;
}
int cudaGraphGetNodes(Handle, Handle *, size_t *count) { return *count = 1, 0; }
int cudaGraphInstantiateWithFlags(Handle *executable, Handle, unsigned long long) { return make(executable); }
int cudaGraphLaunch(Handle, Handle) { return graph_launches++, 0; }
int cudaGraphNodeGetDependencies(Handle, Handle *, void *, size_t *count) { return *count = 0, 0; }
int cudaUserObjectCreate(Handle *object) { return make(object); }

// --- kernels ---------------------------------------------------------------------------------------------------------

int cudaLaunchKernel(const void *, dim3 grid, dim3 block, void **, size_t, Handle) {
  size_t threads = size_t(block.x) * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || !threads || threads > 1024) return fail(kInvalidConfiguration);
  return launched();
}
int __cudaLaunchKernel(Handle, dim3 grid, dim3 block, void **arguments, size_t shared, Handle stream) {
  return cudaLaunchKernel(nullptr, grid, block, arguments, shared, stream);
}
int cudaLaunchKernelExC(const void *, const void *, void **) { return launched(); }
int cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 32, attributes->maxDynamicSharedSizeBytes = 49152;
  attributes->ptxVersion = attributes->binaryVersion = capability;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t, unsigned) {
  return *blocks = 2, 0;
}
int cudaGetDriverEntryPointByVersion(const char *, Handle *function, unsigned, unsigned long long, int *status) {
  *function = nullptr;
  if (status) *status = 1;  // not found
  return 0;
}
int cudaGetSymbolAddress(void **address, const void *) {
  static char memory[1 << 16];
  return *address = memory, 0;
}
static thread_local struct {
  dim3 grid, block;
  size_t shared;
  Handle stream;
} configurations[16];
static thread_local int configured = 0;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, Handle stream) {
  configurations[configured++] = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, Handle *stream) {
  auto &last = configurations[--configured];
  *grid = last.grid, *block = last.block, *shared = last.shared, *stream = last.stream;
  return 0;
}
int __cudaGetKernel(Handle *kernel, const void *) { return *kernel = (Handle)0x20, 0; }
void **__cudaRegisterFatBinary(void *) {
  static void *handle[4];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaRegisterFunction() {}
void __cudaRegisterVar() {}
void __cudaUnregisterFatBinary(void **) {}

// --- cuBLAS ----------------------------------------------------------------------------------------------------------

int cublasCreate_v2(Handle *handle) { return make(handle); }
int cublasGetMathMode(Handle, int *mode) { return *mode = 0, 0; }
int cublasGetPointerMode_v2(Handle, int *mode) { return *mode = 0, 0; }
int cublasSgemm_v2() { return launched(); }
int cublasGemmEx() { return launched(); }
int cublasGemmStridedBatchedEx() { return launched(); }
size_t cublasLtGetVersion() { return 130100; }
int cublasLtCreate(Handle *handle) { return make(handle); }
int cublasLtMatmulDescCreate(Handle *descriptor) { return make(descriptor); }
int cublasLtMatmulPreferenceCreate(Handle *preference) { return make(preference); }
int cublasLtMatrixLayoutCreate(Handle *layout) { return make(layout); }
int cublasLtMatmul() { return launched(); }
int cublasLtMatmulAlgoGetHeuristic(Handle, Handle, Handle, Handle, Handle, Handle, Handle, int, void *results, int *count) {
  memset(results, 0, 96);  // a cublasLtMatmulHeuristicResult_t: no workspace, success
  return *count = 1, 0;
}

// --- cuDNN: one engine for each operation, found by heuristics -------------------------------------------------------

size_t cudnnGetVersion() { return CUDNN_VERSION; }
int cudnnGetProperty(int part, int *value) {
  const int version[] = {CUDNN_MAJOR, CUDNN_MINOR, CUDNN_PATCHLEVEL};
  return *value = version[part], 0;
}
size_t cudnnGetCudartVersion() { return 13000; }
const char *cudnnGetErrorString(int) { return "fake"; }
int cudnnCreate(Handle *handle) { return make(handle); }
int cudnnCreateTensorDescriptor(Handle *descriptor) { return make(descriptor); }
int cudnnCreateFilterDescriptor(Handle *descriptor) { return make(descriptor); }
int cudnnCreateConvolutionDescriptor(Handle *descriptor) { return make(descriptor); }
int cudnnCreateActivationDescriptor(Handle *descriptor) { return make(descriptor); }
int cudnnCreateDropoutDescriptor(Handle *descriptor) { return make(descriptor); }
int cudnnCreatePoolingDescriptor(Handle *descriptor) { return make(descriptor); }
int cudnnBackendCreateDescriptor(int, Handle *descriptor) { return make(descriptor); }
int cudnnBackendGetAttribute(Handle, int attribute, int type, int64_t, int64_t *count, void *values) {
  const int kHeuristicResults = 202, kInt64 = 3;
  int64_t found = attribute == kHeuristicResults || type == kInt64;
  if (count) *count = found;
  if (values && type == kInt64) *(int64_t *)values = 0;  // such as the bytes of workspace
  return 0;
}
int cudnnBackendExecute() { return launched(); }
int cudnnBatchNormalizationForwardTrainingEx() { return launched(); }
int cudnnBatchNormalizationBackwardEx() { return launched(); }
int cudnnBatchNormalizationForwardInference() { return launched(); }
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(Handle, int, int, Handle, Handle, Handle, Handle, Handle,
                                                             size_t *bytes) {
  return *bytes = 0, 0;
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(Handle, int, int, Handle, Handle, Handle, Handle, Handle, Handle,
                                                      Handle, size_t *bytes) {
  return *bytes = 0, 0;
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(Handle, int, int, Handle, Handle, size_t *bytes) {
  return *bytes = 0, 0;
}

// --- NCCL: ranks receive what they have sent themselves ----------------------------------------------------------------

int ncclGetVersion(int *version) { return *version = 23007, 0; }
const char *ncclGetErrorString(int) { return "fake"; }
const char *ncclGetLastError(Handle) { return ""; }
int ncclGetUniqueId(void *id) { return memset(id, 7, 128), 0; }
int ncclCommInitRank(Handle *communicator) { return make(communicator); }
int ncclCommInitRankConfig(Handle *communicator) { return make(communicator); }
int ncclCommInitRankScalable(Handle *communicator) { return make(communicator); }
int ncclCommGetAsyncError(Handle, int *error) { return *error = 0, 0; }
int ncclCommCount(Handle, int *count) { return *count = ranks, 0; }
int ncclCommUserRank(Handle, int *rank) { return *rank = rank_of_process, 0; }
int ncclAllReduce(const void *from, void *to, size_t elements, int dtype, int, Handle, Handle stream) {
  return collective(stream, from, to, elements, dtype);
}
int ncclBroadcast(const void *from, void *to, size_t elements, int dtype, int, Handle, Handle stream) {
  return collective(stream, from, to, elements, dtype);
}
int ncclBcast(void *memory, size_t elements, int dtype, int, Handle, Handle stream) {
  return collective(stream, memory, memory, elements, dtype);
}
int ncclAllGather(const void *from, void *to, size_t elements, int dtype, Handle, Handle stream) {
  return collective(stream, from, to, elements, dtype, ranks);
}

}  // extern "C"

namespace c10::cuda {
bool hasPrimaryContext(signed char index) {
  std::lock_guard<std::mutex> lock(mutex);
  return contexts.count(index);
}
}  // namespace c10::cuda
