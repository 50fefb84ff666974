# godwit_cuda_plugin(SRCS a.cu b.cc...): libgodwit_cuda.so beside the executable.
# Everything CUDA lives in kernels/cuda and in this one plugin, so that the executable never has a
# CUDA library among its NEEDED entries and starts on machines without one.
if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(GODWIT_NVCC nvcc
    HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(GODWIT_NVCC)
    set(CMAKE_CUDA_COMPILER ${GODWIT_NVCC})
  endif()
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  # H100 and H200; sm_90a code runs on Hopper only. A release takes "80-real;90a-real;100-virtual".
  set(CMAKE_CUDA_ARCHITECTURES 90a-real CACHE STRING "architectures of the CUDA back end")
endif()
# The kernels of Hopper have no body in plain 90, and would still be launched.
if("${CMAKE_CUDA_ARCHITECTURES}" MATCHES "(^|;)90(-|;|$)")
  message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES: take 90a for Hopper, not 90")
endif()
enable_language(CUDA)
find_package(CUDAToolkit 12.4 REQUIRED)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 knows CUDA17 at most
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_FLAGS_RELWITHDEBINFO "-O3 -lineinfo -DNDEBUG")

function(godwit_cuda_plugin)
  cmake_parse_arguments(P "" "" "SRCS" ${ARGN})
  add_library(godwit_cuda MODULE ${P_SRCS})
  set_target_properties(godwit_cuda PROPERTIES
    CUDA_RUNTIME_LIBRARY Static
    INSTALL_RPATH "$ORIGIN:${CUDAToolkit_LIBRARY_DIR}")
  target_link_libraries(godwit_cuda PRIVATE
    godwit_options CUDA::cudart_static CUDA::cublasLt ${CMAKE_DL_LIBS})
  target_link_options(godwit_cuda PRIVATE LINKER:--exclude-libs,ALL)
endfunction()
