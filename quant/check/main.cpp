// glm4lite_check: one line for each ISA of this host; exit code 1 at the first difference. An ISA's name as the argument
// makes it the only one, and its absence an error.
#include <stdarg.h>
#include <stdio.h>

#include <chrono>

#include "check.h"

namespace {

const char* const kNames[GLM4_ISAS] = {"scalar", "avx2", "avxvnni", "avx512vnni", "neon", "neoni8mm"};
char current[256] = "", isa_name[16] = "";

void run(int isa) {
  snprintf(isa_name, sizeof(isa_name), "%s", kNames[isa]);
  const auto start = std::chrono::steady_clock::now();
  check::check_products(isa);
  check::check_quantizing(isa);
  check::check_layers(isa);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  printf("%s: products, quantizing and decoder layers are right (%.1f s)\n", isa_name, took.count());
  fflush(stdout);
}

}  // namespace

void check::describe(const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(current, sizeof(current), format, args);
  va_end(args);
}

void check::fail(const char* format, ...) {
  printf("%s: %s: ", isa_name, current);
  va_list args;
  va_start(args, format);
  vprintf(format, args);
  va_end(args);
  printf("\n");
  fflush(stdout);
  exit(1);
}

int main(int count, char** words) {
  int ran = 0;
  for (int isa = 0; isa < GLM4_ISAS; ++isa) {
    if (!glm4_isa_available(isa) || (count > 1 && strcmp(words[1], kNames[isa]) != 0)) continue;
    run(isa);
    ++ran;
  }
  if (ran == 0) printf("this host has no such ISA\n");
  return ran == 0;
}
