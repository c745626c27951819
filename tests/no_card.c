/* The CUDA runtime and driver of an H100 that is not there: it has properties, streams and events,
   but computes nothing. A CUDA build of torch compiles for the card with it: test_compiler.py. */
#include <driver_types.h>
#include <stdlib.h>
#include <string.h>

#define OK(name) int name() { return 0; }
#define NUMBER(name, value) int name(int *n) { *n = value; return 0; }
#define MADE(name) int name(void **made) { *made = calloc(1, 64); return 0; }

NUMBER(cudaGetDeviceCount, 1)
NUMBER(cudaGetDevice, 0)
NUMBER(cudaDeviceCanAccessPeer, 0)
NUMBER(cudaDeviceGetAttribute, 0)
NUMBER(cudaDriverGetVersion, 13000)
NUMBER(cudaRuntimeGetVersion, 13000)
NUMBER(cudaThreadExchangeStreamCaptureMode, 0)
MADE(cudaEventCreate)
MADE(cudaEventCreateWithFlags)
MADE(cudaStreamCreateWithFlags)
MADE(cudaStreamCreateWithPriority)
OK(cudaSetDevice) OK(cudaDeviceSynchronize) OK(cudaGetLastError) OK(cudaPeekAtLastError)
OK(cudaEventRecord) OK(cudaEventRecordWithFlags) OK(cudaEventQuery) OK(cudaEventSynchronize)
OK(cudaEventDestroy) OK(cudaStreamSynchronize) OK(cudaStreamQuery) OK(cudaStreamWaitEvent)
OK(cudaStreamDestroy) OK(cudaFree) OK(cudaLaunchKernel) OK(cudaLaunchKernelExC)
OK(cudaFuncSetAttribute) OK(cudaMemcpyAsync) OK(cudaMemsetAsync)

int cudaStreamIsCapturing(void *stream, int *n) { *n = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *n) { *n = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0; *high = -5; return 0; }
int cudaMemGetInfo(size_t *left, size_t *all) { *left = *all = 85000000000; return 0; }
const char *cudaGetErrorName(int error) { return "error"; }
const char *cudaGetErrorString(int error) { return "the card is not there"; }

int cudaMalloc(void **p, size_t n) {
    *p = aligned_alloc(512, (n / 512 + 1) * 512);
    return *p ? 0 : 2;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H100 80GB HBM3");
    p->totalGlobalMem = 85000000000;
    p->major = 9;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->l2CacheSize = 52428800;
    return 0;
}

/* The driver: what libcaffe2_nvrtc.so and Triton link to. */
NUMBER(cuDeviceGetCount, 1)
NUMBER(cuDriverGetVersion, 13000)
OK(cuInit) OK(cuCtxGetCurrent) OK(cuCtxSetCurrent) OK(cuCtxGetDevice) OK(cuCtxGetLimit)
OK(cuCtxSetLimit) OK(cuDeviceGet) OK(cuDeviceGetAttribute) OK(cuDevicePrimaryCtxRetain)
OK(cuFuncGetAttribute) OK(cuFuncSetAttribute) OK(cuFuncSetCacheConfig) OK(cuGetErrorString)
OK(cuLaunchCooperativeKernel) OK(cuLaunchKernel) OK(cuLaunchKernelEx) OK(cuLinkAddData_v2)
OK(cuLinkComplete) OK(cuLinkCreate_v2) OK(cuModuleGetFunction) OK(cuModuleLoad)
OK(cuModuleLoadData) OK(cuModuleLoadDataEx) OK(cuModuleUnload) OK(cuPointerGetAttribute)
OK(cuOccupancyMaxActiveBlocksPerMultiprocessor) OK(cuOccupancyMaxActiveClusters)
OK(cuTensorMapEncodeTiled) OK(cuTensorMapEncodeIm2col)

int cuStreamIsCapturing(void *stream, int *n) { *n = 0; return 0; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return 0;
}
