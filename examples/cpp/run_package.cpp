// Runs a package of compiled_attn.export.package without Python:
//
//     run_package model.pt2 inputs.pt outputs.pt
//
// inputs.pt holds a list of tensors, written by torch.save([...]) in the order of the manifest's "inputs"; outputs.pt
// is a tuple that torch.load reads. The compiled code trusts its caller: it reads every input as contiguous and in the
// shape and dtype it was exported with. compiled_attn.export.load checks that; here it is up to you.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) {
    throw std::runtime_error("cannot write " + path);
  }
}

std::vector<at::Tensor> tensors(const c10::IValue& value) {
  std::vector<at::Tensor> found;
  for (const c10::IValue& one : value.toListRef()) {
    found.push_back(one.toTensor().contiguous());
  }
  return found;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: run_package model.pt2 inputs.pt outputs.pt\n";
    return 2;
  }
  try {
    torch::inductor::AOTIModelPackageLoader model(arguments[1]);
    const std::vector<at::Tensor> outputs = model.run(tensors(torch::jit::pickle_load(read(arguments[2]))));
    // a tuple: the pickle of a tensor list names a function that torch.load does not trust
    const std::vector<c10::IValue> values(outputs.begin(), outputs.end());
    write(arguments[3], torch::jit::pickle_save(c10::ivalue::Tuple::create(values)));
    for (const at::Tensor& output : outputs) {
      std::cout << output.scalar_type() << " " << output.sizes() << " on " << output.device() << "\n";
    }
  } catch (const std::exception& error) {
    std::cerr << "run_package: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
