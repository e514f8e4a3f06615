// The kernels' exp of the numbers on standard input, raw and in whole vectors; built and called by test_exp.py.
#include <cstdio>
#include <cstring>
#include <vector>

#include "simd.h"

template <typename T>
int run() {
  std::vector<T> line(sinkhorn::kWidth<T>);
  while (std::fread(line.data(), sizeof(T), line.size(), stdin) == line.size()) {
    sinkhorn::exp_of(sinkhorn::Vec<T>::loadu(line.data())).store(line.data());
    std::fwrite(line.data(), sizeof(T), line.size(), stdout);
  }
  return 0;
}

int main(int, char** arguments) { return std::strcmp(arguments[1], "float32") ? run<double>() : run<float>(); }
