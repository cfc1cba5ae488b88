/* Loads a SavedModel through TensorFlow's C API, as a C++ server does, and runs it once.
 *
 *   run_saved_model SAVED_MODEL REQUEST ANSWER [OP_LIBRARY ...]
 *
 * REQUEST and ANSWER hold little-endian records. REQUEST: int32 number of inputs, then the inputs; int32 number of
 * outputs, then their names. ANSWER: the outputs in that order. A tensor: name, int32 dtype, int32 rank, int64 sizes,
 * int64 number of bytes, data. A name, and each string of a string tensor: int64 length, bytes.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

static void fail(const char* what, const char* why) {
  fprintf(stderr, "run_saved_model: %s: %s\n", what, why);
  exit(1);
}

static void check(TF_Status* status, const char* what) {
  if (TF_GetCode(status) != TF_OK) fail(what, TF_Message(status));
}

static void get(FILE* file, void* to, size_t size) {
  if (size && fread(to, size, 1, file) != 1) fail("request", "it ends too early");
}

static void put(FILE* file, const void* from, size_t size) {
  if (size && fwrite(from, size, 1, file) != 1) fail("answer", "it cannot be written");
}

static int32_t get_int32(FILE* file) {
  int32_t value;
  get(file, &value, sizeof value);
  return value;
}

static int64_t get_int64(FILE* file) {
  int64_t value;
  get(file, &value, sizeof value);
  return value;
}

static char* get_text(FILE* file, int64_t* length) {
  *length = get_int64(file);
  char* text = malloc(*length + 1);
  get(file, text, *length);
  text[*length] = 0;
  return text;
}

/* "name:0" in the graph. */
static TF_Output find(TF_Graph* graph, char* name) {
  char* colon = strrchr(name, ':');
  int index = 0;
  if (colon) {
    index = atoi(colon + 1);
    *colon = 0;
  }
  TF_Output found = {TF_GraphOperationByName(graph, name), index};
  if (!found.oper) fail("no such tensor", name);
  return found;
}

static TF_Tensor* get_tensor(FILE* file) {
  TF_DataType dtype = get_int32(file);
  int32_t rank = get_int32(file);
  int64_t dims[16], count = 1;
  if (rank > 16) fail("request", "too many dimensions");
  for (int i = 0; i < rank; ++i) count *= dims[i] = get_int64(file);
  int64_t bytes = get_int64(file);
  if (dtype != TF_STRING) {
    TF_Tensor* tensor = TF_AllocateTensor(dtype, dims, rank, bytes);
    get(file, TF_TensorData(tensor), bytes);
    return tensor;
  }
  TF_Tensor* tensor = TF_AllocateTensor(dtype, dims, rank, count * sizeof(TF_TString));
  TF_TString* strings = TF_TensorData(tensor);
  for (int64_t i = 0; i < count; ++i) {
    int64_t length;
    char* text = get_text(file, &length);
    TF_StringInit(&strings[i]);
    TF_StringCopy(&strings[i], text, length);
    free(text);
  }
  return tensor;
}

static void put_tensor(FILE* file, TF_Tensor* tensor) {
  int32_t dtype = TF_TensorType(tensor), rank = TF_NumDims(tensor);
  int64_t count = 1, bytes = TF_TensorByteSize(tensor);
  put(file, &dtype, sizeof dtype);
  put(file, &rank, sizeof rank);
  for (int i = 0; i < rank; ++i) {
    int64_t size = TF_Dim(tensor, i);
    put(file, &size, sizeof size);
    count *= size;
  }
  put(file, &bytes, sizeof bytes);
  if (dtype != TF_STRING) {
    put(file, TF_TensorData(tensor), bytes);
    return;
  }
  const TF_TString* strings = TF_TensorData(tensor);
  for (int64_t i = 0; i < count; ++i) {
    int64_t length = TF_StringGetSize(&strings[i]);
    put(file, &length, sizeof length);
    put(file, TF_StringGetDataPointer(&strings[i]), length);
  }
}

int main(int argc, char** argv) {
  if (argc < 4) fail("usage", "run_saved_model SAVED_MODEL REQUEST ANSWER [OP_LIBRARY ...]");
  TF_Status* status = TF_NewStatus();
  for (int i = 4; i < argc; ++i) {
    TF_LoadLibrary(argv[i], status);
    check(status, argv[i]);
  }
  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* tags[] = {"serve"};
  TF_Session* session = TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
  check(status, argv[1]);

  FILE* request = fopen(argv[2], "rb");
  if (!request) fail(argv[2], "it cannot be read");
  int64_t length;
  int32_t inputs = get_int32(request);
  TF_Output* feeds = calloc(inputs + 1, sizeof *feeds);
  TF_Tensor** values = calloc(inputs + 1, sizeof *values);
  for (int i = 0; i < inputs; ++i) {
    feeds[i] = find(graph, get_text(request, &length));
    values[i] = get_tensor(request);
  }
  int32_t outputs = get_int32(request);
  TF_Output* fetches = calloc(outputs + 1, sizeof *fetches);
  TF_Tensor** answers = calloc(outputs + 1, sizeof *answers);
  for (int i = 0; i < outputs; ++i) fetches[i] = find(graph, get_text(request, &length));
  fclose(request);

  TF_SessionRun(session, NULL, feeds, values, inputs, fetches, answers, outputs, NULL, 0, NULL, status);
  check(status, "run");
  FILE* answer = fopen(argv[3], "wb");
  if (!answer) fail(argv[3], "it cannot be written");
  for (int i = 0; i < outputs; ++i) put_tensor(answer, answers[i]);
  fclose(answer);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  return 0;
}
