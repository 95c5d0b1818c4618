// Runs a detector without Python: `python -m dcn_plugin export CONFIG CHECKPOINT model.pt2 --format aoti --normalize`
// makes the package, dcn_plugin/_cpu.so has the operators. Prints the tensors of which boxes are made; model.pt2.json
// names them and holds what the head needs for that.
//
//   detect _cpu.so model.pt2 image.ppm
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>

// A binary PPM of 8 bits (`convert in.jpg -resize 192x192! out.ppm`) as (1, 3, H, W), BGR, 0 to 255.
static at::Tensor read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, largest = 0;
  file >> magic >> width >> height >> largest;
  file.get();  // the one white space before the pixels
  if (magic != "P6" || largest != 255 || width < 1 || height < 1)
    throw std::runtime_error(path + " is no PPM image of 8 bits");
  at::Tensor pixels = at::empty({height, width, 3}, at::kByte);
  if (!file.read(reinterpret_cast<char*>(pixels.data_ptr()), pixels.numel()))
    throw std::runtime_error(path + " ends too early");
  return pixels.permute({2, 0, 1}).flip(0).to(at::kFloat).unsqueeze(0).contiguous();
}

int main(int argc, char** argv) try {
  if (argc != 4) throw std::runtime_error("usage: detect LIBRARY PACKAGE IMAGE");
  // Loading the library registers the operators with PyTorch.
  if (!dlopen(argv[1], RTLD_NOW)) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  c10::InferenceMode inference;
  const auto outputs = model.run({read_image(argv[3])});
  for (size_t i = 0; i < outputs.size(); ++i)
    std::cout << "output " << i << ": shape " << outputs[i].sizes() << ", mean " << outputs[i].mean().item<double>()
              << ", largest " << outputs[i].max().item<double>() << "\n";
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
