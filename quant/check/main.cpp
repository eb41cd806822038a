// glm4lite_check [ISA...] [products|quantizing|layers|threads|uneven...]: one line for each ISA, those of this host where none
// is named; exit code 1 at the first difference, or where the host lacks an ISA that is named.
#include <stdarg.h>
#include <stdio.h>

#include <chrono>

#include "check.h"

namespace {

const char* const kNames[GLM4_ISAS] = {"scalar", "avx2", "avxvnni", "avx512vnni", "neon", "neoni8mm"};
char current[256] = "", isa_name[16] = "";

using Part = void (*)(int isa);
struct Named {
  const char* name;
  Part run;
};
const Named kParts[] = {{"products", check::check_products},
                        {"quantizing", check::check_quantizing},
                        {"layers", check::check_layers},
                        {"threads", check::check_threads},
                        {"uneven", check::check_uneven_threads}};

bool chosen(const char* name, int count, char** words) {
  for (int i = 0; i < count; ++i)
    if (strcmp(words[i], name) == 0) return true;
  return false;
}

template <class Name>
bool any(int of, Name name, int count, char** words) {
  for (int i = 0; i < of; ++i)
    if (chosen(name(i), count, words)) return true;
  return false;
}

void run(int isa, bool all, int count, char** words) {
  snprintf(isa_name, sizeof(isa_name), "%s", kNames[isa]);
  printf("%s:", isa_name);
  for (const Named& part : kParts) {
    if (!all && !chosen(part.name, count, words)) continue;
    const auto start = std::chrono::steady_clock::now();
    part.run(isa);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    printf(" %s %.1f s", part.name, took.count());
    fflush(stdout);
  }
  printf(", all right\n");
}

}  // namespace

void check::describe(const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(current, sizeof(current), format, args);
  va_end(args);
}

void check::fail(const char* format, ...) {
  printf("\n%s: %s: ", isa_name, current);
  va_list args;
  va_start(args, format);
  vprintf(format, args);
  va_end(args);
  printf("\n");
  fflush(stdout);
  exit(1);
}

int main(int count, char** words) {
  --count, ++words;
  const bool every_isa = !any(GLM4_ISAS, [](int i) { return kNames[i]; }, count, words);
  const bool every_part = !any(sizeof(kParts) / sizeof(kParts[0]), [](int i) { return kParts[i].name; }, count, words);
  int ran = 0;
  for (int isa = 0; isa < GLM4_ISAS; ++isa) {
    if (!every_isa && !chosen(kNames[isa], count, words)) continue;
    if (!glm4_isa_available(isa) && every_isa) continue;
    if (!glm4_isa_available(isa)) return printf("this host has no %s\n", kNames[isa]), 1;
    run(isa, every_part, count, words);
    ++ran;
  }
  return ran == 0;
}
